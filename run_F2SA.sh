#!/usr/bin/env bash
# Fine-tune a language model and learn data weights in one run.
#
#   bash run_F2SA.sh                                       shipped data; configs/gpt2.yaml on a GPU, otherwise configs/tiny.yaml
#   CONFIG=configs/gpt2.yaml lr_y=2e-5 bash run_F2SA.sh    choose a run file; each setting of train_bilevel.py (see --help)
#                                                          is an environment variable
#   data_dir=my_data weights=sample bash run_F2SA.sh       your data: train_*.json (weights=source) or mixed/train_mixed.json
#                                                          (weights=sample), val.json, and test.json if there is one
#   data_dir=my_data prepare=1 bash run_F2SA.sh            run my_data/process.py first
#   bash run_F2SA.sh --alpha 100                           flags are passed to train_bilevel.py and override variables
#   DRY_RUN=1 bash run_F2SA.sh                             check settings and data files, print what the run will take
#                                                          (steps, memory, disk, time), and stop; exit code 2 if it does
#                                                          not fit; with -v also all settings and the memory plan
#   NGPU=4 bash run_F2SA.sh                                DeepSpeed on 4 GPUs (default: all visible GPUs);
#                                                          with lora_rank plain torch in as many processes
#   NPROC=2 bash run_F2SA.sh                               DeepSpeed in 2 processes on a CPU
#   HOSTFILE=hosts bash run_F2SA.sh                        several machines over ssh; one line `name slots=8` per machine
#   HOSTFILE=hosts NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash run_F2SA.sh
#                                                          without ssh: start it on each machine; NODE_RANK is its line
#                                                          number in HOSTFILE from 0, MASTER_ADDR the first machine
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ "$here" = "$PWD" ] && here=.
python=${PYTHON:-python}
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

mistake() {
  echo "error: $1" >&2
  exit 2
}

# Whether a switch such as DRY_RUN is on.
is_on() {
  case ${!1:-0} in
    1 | true | True | TRUE | yes | on) return 0 ;;
    0 | false | False | FALSE | no | off) return 1 ;;
    *) mistake "$1=${!1}: expected 1 or 0" ;;
  esac
}

for name in NPROC NGPU NODE_RANK; do
  [[ -z ${!name:-} || ${!name} =~ ^[0-9]{1,6}$ ]] || mistake "$name=${!name}: expected a whole number"
done
is_on DRY_RUN || is_on prepare || true # report a wrong word before anything is done

# The run file.
if [ -n "${CONFIG:-}" ]; then
  chosen=CONFIG
elif nvidia-smi -L >/dev/null 2>&1; then
  CONFIG=$here/configs/gpt2.yaml chosen="a GPU was found"
else
  CONFIG=$here/configs/tiny.yaml chosen="no GPU was found"
fi
echo "run_F2SA.sh: $CONFIG ($chosen); CONFIG=FILE chooses another"
flags=(--config "$CONFIG")

# Settings from the environment.
names=$("$python" -m bilevel.settings)
for name in $names; do
  if [ -n "${!name:-}" ]; then flags+=("--$name=${!name}"); fi
done

# The data. The process.py of a folder that is not the shipped one is somebody's program: it runs only with prepare=1.
shipped=$here/data_alpaca_0.5
case ${data_dir:-} in
  -* | \[* | {*) data_dir=./$data_dir ;; # neither a flag nor a list
esac
if [ -n "${data_dir:-}" ] && ! [ "$data_dir" -ef "$shipped" ] && is_on prepare; then
  [ -f "$data_dir/process.py" ] || mistake "prepare=1: there is no $data_dir/process.py"
  "$python" "$data_dir/process.py" --if-needed
fi
mode=${weights:-}
for ((i = 1; i <= $#; i++)); do
  case ${!i} in
    --weights) next=$((i + 1)) mode=${!next:-} ;;
    --weights=*) mode=${!i#--weights=} ;;
  esac
done
if [ "$mode" = sample ] && [ "$chosen" != CONFIG ]; then data_dir=${data_dir:-$shipped}; fi
if [ -n "${data_dir:-}" ]; then
  train=$(sed 's/[[*?]/[&]/g' <<<"$data_dir")/train_*.json # the folder's own name is no pattern
  [ "$mode" = sample ] && train=$data_dir/mixed/train_mixed.json
  [ -n "${train_data:-}" ] || flags+=(--train_data "$train")
  [ -n "${val_data:-}" ] || flags+=(--val_data "$data_dir/val.json")
  if [ -z "${test_data:-}" ]; then
    if [ -f "$data_dir/test.json" ]; then
      flags+=(--test_data "$data_dir/test.json")
    elif ! [ "$data_dir" -ef "$shipped" ]; then
      flags+=(--test_data "[]") # not the run file's, which are other data
    fi
  fi
fi

# The shipped data: their process.py writes the files that are missing, or whose constants have changed, if the run
# reads any of them.
if [ -f "$shipped/process.py" ] &&
  [ "$("$python" -m bilevel.settings --reads "$shipped" "${flags[@]}" "$@")" = yes ]; then
  "$python" "$shipped/process.py" --if-needed
fi

# The processes: one per visible GPU (at most NGPU), or NPROC on a CPU, or those of all machines in HOSTFILE.
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .); fi
processes=${NPROC:-${NGPU:-$gpus}}
if [ "${processes:-0}" -lt 1 ]; then processes=1; fi
total=$processes
if [ -n "${HOSTFILE:-}" ]; then
  [ -f "$HOSTFILE" ] || mistake "HOSTFILE=$HOSTFILE: there is no such file"
  slots=$(awk '
    { sub(/#.*/, "") }
    NF == 0 { next }
    NF != 2 || $2 !~ /^slots=[1-9][0-9]*$/ { bad = 1; print "line " NR; exit }
    { n = substr($2, 7) + 0; sum += n; if (n > most) most = n }
    END { if (!bad && !sum) { bad = 1; print "no machine" } if (bad) exit 1; print sum, most }
  ' <"$HOSTFILE") || mistake "HOSTFILE=$HOSTFILE, $slots: expected a line \`name slots=N\` for each machine"
  case $HOSTFILE in -*) HOSTFILE=./$HOSTFILE ;; esac
  total=${slots% *} processes=${slots#* }
  launch=("${DEEPSPEED:-deepspeed}" --no_local_rank --hostfile "$HOSTFILE" ${NGPU:+--num_gpus "$NGPU"})
  if [ -n "${NODE_RANK:-}" ]; then
    launch+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "${MASTER_ADDR:?must be given together with NODE_RANK: the address of machine 0}")
  fi
elif [ "$processes" -gt 1 ]; then
  # On a signal the processes have five minutes to write a checkpoint; then they are ended.
  launch=("$python" -m bilevel.run.torchrun --standalone --nproc_per_node "$processes" --shutdown_timeout 300)
else
  launch=("$python")
fi

script=("$here/train_bilevel.py" "${flags[@]}" "$@")
check=(env WORLD_SIZE="$total" LOCAL_WORLD_SIZE="$processes" "$python" "${script[@]}" --dry_run)
if is_on DRY_RUN; then exec "${check[@]}"; fi
# Report mistakes once, here, instead of in every process and under the launcher's own report.
if [ "${launch[*]}" != "$python" ]; then BILEVEL_FILES_ONLY=1 "${check[@]}"; fi
exec "${launch[@]}" "${script[@]}"
