"""Fine-tune a causal language model and learn, in the same run, how much each source or each record should count.

train_bilevel.py in the folder above is the training script. A wing imports only from itself and from wings above it in
this list (tests/test_layout.py). docs/contributing.md ("Where is it?") says which function does what.

    errors.py      what a user is told when something is wrong
    files.py       files that are whole or absent, content hashes, the cache folder
    seeding.py     every random number, from a seed and a step
    shell.py       what a command leaves to the shell: exit code, output without a reader
    processes.py   the processes of a run and sums over them
    settings/      every setting and its default, what contradicts what, the command line
    data/          from files of records to tokens and batches: formats (layouts/), chat templates
    model/         one copy of a model: loading, training, losses, adapters, LISA, ZeRO
    weights/       the upper level: weights c(x), the gradient of x, the rules that move x, weights.csv
    step/          one training step of each method
    memory/        the memory plan: will a run fit
    monitor/       what watches a run: metrics, evaluation, warnings
    run/           a run's life: checks, folder, checkpoints, messages, results
    baselines/     methods that score records instead of learning weights
    evaluate/      python -m bilevel.evaluate: held-out loss and right answers of a model
    export/        python -m bilevel.export: the cleaned data of a finished run
    prepare/       python -m bilevel.prepare: reads and tokenises before a run, and shows records as trained on
    report/        python -m bilevel.report: the page that shows a finished run
    compare/       python -m bilevel.compare: methods side by side over several seeds
"""
