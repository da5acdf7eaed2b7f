"""Where a search's trials are: a storage of optuna that many processes and hosts share."""

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

from effjax.errors import EffjaxError
from effjax.nas.optuna_search import optuna, quiet
from experiments.harness.config import difference
from experiments.harness.errors import ExperimentError, RunError, UsageError


def open_study(
    url: str, name: str, record: dict[str, Any], directions: Sequence[str], sampler: Any
) -> Any:
    """The study of a search: made, or found again to go on.

    Args:
      url: "sqlite:///trials.db", "postgresql+psycopg://user:password@host/base", ...; or a file's
        path ending in .log, for optuna's journal, where a file system has no locks.
      name: of the study.
      record: what the search is, as JSON; kept in the study.
      directions: "maximize" or "minimize", for each objective.
      sampler: of optuna.

    Raises:
      UsageError: another kind of storage.
      RunError: the storage cannot be reached, or the study is of another search.
    """
    with reached(url), quiet() as module:
        study = module.create_study(
            study_name=name,
            storage=_storage(url),
            directions=list(directions),
            load_if_exists=True,
            sampler=sampler,
        )
        if "search" not in study.user_attrs:
            study.set_user_attr("search", record)
        before = study.user_attrs["search"]
    if changed := difference(before, record):
        raise RunError(
            f"the study {name} in {shown(url)} is another search ({changed}). Give this one "
            "another --id, or leave --id out; nothing was written."
        )
    return study


def shown(url: str) -> str:
    """A storage's address without its password."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)


def _storage(url: str) -> Any:
    storages = optuna().storages
    if url.endswith(".log") and "://" not in url:
        from optuna.storages.journal import JournalFileBackend

        return storages.JournalStorage(JournalFileBackend(url))
    if "://" not in url:
        raise UsageError(
            f"--storage {url} is no storage; give sqlite:///FILE, a postgresql:// or mysql:// "
            "address, or a file's path ending in .log for a journal."
        )
    # A file's database is locked while another worker writes: wait for it.
    waits = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    try:
        return storages.RDBStorage(url, engine_kwargs=waits)
    except Exception as error:
        if not _of_storage(error):
            raise
        time.sleep(1)  # another worker may be making the tables at this moment
        return storages.RDBStorage(url, engine_kwargs=waits)


@contextlib.contextmanager
def reached(url: str) -> Iterator[None]:
    """Errors of a storage, told to a person."""
    try:
        yield
    except (ExperimentError, EffjaxError):
        raise
    except ImportError as error:
        raise RunError(f"{shown(url)} needs a driver that is not installed: {error}.") from error
    except Exception as error:
        if not _of_storage(error):
            raise
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise RunError(
            f"the storage {shown(url)} cannot be reached: {first.replace(url, shown(url))}. What "
            "is finished is kept; give the same command again when the storage is there."
        ) from error


def _of_storage(error: Exception) -> bool:
    module = type(error).__module__.partition(".")[0]
    return module in ("sqlalchemy", "optuna") or isinstance(error, OSError)
