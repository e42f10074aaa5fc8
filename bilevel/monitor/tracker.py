"""Trackers, which receive metrics in addition to metrics.csv: wandb, or none."""

import contextlib
import logging
import netrc
import os
import queue
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from bilevel.weights.fixed import FixedSampleWeights
from bilevel.weights.statistics import histogram

if TYPE_CHECKING:  # importing it takes a second, so it is done late
    import wandb

log = logging.getLogger("bilevel")
SOURCES = ("source", "samples", "weight", "verdict")  # columns of the table of sources


class NoTracker:
    """Ignores all metrics."""

    def log(self, row: dict[str, Any], weights: FixedSampleWeights | None) -> None:
        pass

    def sources(self, table: list[tuple[Any, ...]]) -> None:
        pass

    def report(self, page: Path) -> None:
        pass

    def close(self) -> None:
        pass


class WandbTracker:
    """Sends metrics to wandb: to your account if you are logged in, else to a folder that can be sent later.

    It never asks. A thread does all of it, so that a server that does not answer neither stops nor slows training:
    after PATIENCE seconds the run is kept in the folder only.
    """

    PATIENCE = 30
    UPLOAD = 600  # seconds for the report

    def __init__(self, folder: Path, name: str, config: dict[str, Any]):
        self.folder, self.name, self.config = folder, name, config
        self.longest = 3 * self.PATIENCE
        self.queue: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self.thread.start()

    def log(self, row: dict[str, Any], weights: FixedSampleWeights | None) -> None:
        self.queue.put((row, histogram(weights, weights.n, 64) if weights else None))

    def sources(self, table: list[tuple[Any, ...]]) -> None:
        """Send what is known of each source at the end of a run: (source, samples, weight, verdict)."""
        self.queue.put(table)

    def report(self, page: Path) -> None:
        """Send the page of a finished run as an artifact. The file must stay where it is until it is sent."""
        self.queue.put(page)
        self.longest += self.UPLOAD

    def close(self) -> None:
        """Wait until everything is sent or stored, three times PATIENCE at most, and UPLOAD more for a report."""
        self.queue.put(None)
        self.thread.join(self.longest)

    def _work(self) -> None:
        try:
            run = self._start()
            sync = f"wandb: kept offline; to send the run later: wandb sync {Path(run.dir).parent}"
            log.info(sync if run.offline else f"wandb: {run.url}")
            while (item := self.queue.get()) is not None:
                with self._files_in_the_folder():
                    self._send(run, item)
            run.finish()
        except Exception as error:  # training must go on after any failure in wandb
            log.warning(f"wandb has failed ({_short(error)}); metrics.csv has everything")

    def _send(self, run: "wandb.Run", item: Any) -> None:
        """Send the table of sources, the page of the report, or a row of metrics with a histogram."""
        if isinstance(item, list):
            run.summary["sources"] = self.wandb.Table(columns=list(SOURCES), data=[list(row) for row in item])
        elif isinstance(item, Path):
            self._artifact(run, item)
        else:
            row, counted = item
            extra = {} if counted is None else {"weights": self.wandb.Histogram(np_histogram=counted)}
            run.log(row | extra, step=row["step"])

    def _artifact(self, run: "wandb.Run", page: Path) -> None:
        """Send the page, or say why not. It is read where it is: wandb makes no copy of it, and keeps none."""
        try:
            found = self.wandb.Artifact(f"report-{run.id}", type="report")
            found.add_file(str(page.absolute()), policy="immutable", skip_cache=True)
            sent = run.log_artifact(found)
            if not run.offline:
                sent.wait(self.UPLOAD)
        except Exception as error:  # all else is still to be sent
            log.warning(f"the report has not been sent to wandb ({_short(error)}); it is in {page}")

    @contextlib.contextmanager
    def _files_in_the_folder(self) -> Iterator[None]:
        """A context in which wandb keeps what it prepares to send in the run's folder, not in the user's home."""
        given = os.environ.get("WANDB_DATA_DIR")
        os.environ["WANDB_DATA_DIR"] = given or str((self.folder / "wandb").absolute())
        try:
            yield
        finally:
            if given is None:
                del os.environ["WANDB_DATA_DIR"]

    def _start(self) -> "wandb.Run":
        """Start a run online if possible, else offline."""
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self.wandb = wandb
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb_logged_in() else "offline")
        try:
            return self._init(mode)
        except Exception as error:
            if mode != "online":
                raise
            log.warning(f"wandb cannot be reached ({_short(error)}): the run is kept offline")
        wandb.teardown()  # otherwise it takes the run's id for one in use
        return self._init("offline")

    def _init(self, mode: str) -> "wandb.Run":
        folder = self.folder / "wandb"
        folder.mkdir(exist_ok=True)
        known = folder / "run_id"  # so that a resumed run continues the same wandb run
        if not known.exists():
            known.write_text(secrets.token_hex(4), encoding="utf-8")
        return self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", "bilevel-reweighting"),
            id=known.read_text(encoding="utf-8"),
            resume="allow",
            name=self.name,
            dir=str(self.folder),
            config=self.config,
            mode=mode,
            settings=self.wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                disable_git=True,
                disable_job_creation=True,
                x_disable_meta=True,  # the command line, programs, host and disks
                x_save_requirements=False,
                host="",
                init_timeout=self.PATIENCE,
                finish_timeout=self.PATIENCE,
            ),
        )


def wandb_disabled() -> str:
    """The environment variable, with its value, that turns wandb off as for other programs; empty if none does."""
    values = {"WANDB_MODE": ("disabled",), "WANDB_DISABLED": ("1", "true", "yes", "on")}
    found = [name for name, off in values.items() if os.environ.get(name, "").lower() in off]
    return f"{found[0]}={os.environ[found[0]]}" if found else ""


def wandb_logged_in() -> bool:
    """Whether wandb finds an API key in the environment or in the netrc file, without asking the user."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
