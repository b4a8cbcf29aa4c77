"""Job files: read a TOML job into its document, and call the Python objects that it names.

An *import string* is ``package.module:attribute``. A *factory* is an import string with keyword arguments. While
import strings are resolved and factories run, the job file's folder and the current folder stand first on
``sys.path``, as a script's folder does. Import strings come from job files only, never from a cache.
"""

from __future__ import annotations

__all__ = ["LoadedJob", "accepts", "make", "read_job", "resolve", "resolve_path"]

import contextlib
import difflib
import importlib
import importlib.machinery
import inspect
import os
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from kdcache.documents import Factory, Job
from kdcache.errors import JobError


@dataclass(frozen=True, slots=True)
class LoadedJob:
    """A job document and the folder of the file that it stood in.

    Parameters
    ----------
    job : Job
        The document.
    folder : Path
        The job file's folder, absolute. Relative paths in the document are meant from here.
    """

    job: Job
    folder: Path

    @property
    def cache_address(self) -> str:
        """The cache's address: a URL as it stands, a path made absolute."""
        return resolve_path(self.job.cache.address, self.folder)

    def make(self, factory: Factory, /, **extra: Any) -> Any:
        """Call a factory of this job; see `make`."""
        return make(factory, self.folder, **extra)


def read_job(path: str | Path) -> LoadedJob:
    """Read a job file.

    Parameters
    ----------
    path : str or Path
        A TOML file.

    Returns
    -------
    LoadedJob
        The checked document and the file's folder. Nothing that it names has been imported.

    Raises
    ------
    JobError
        The file cannot be read or is no TOML; the message gives the line.
    DocumentError
        The TOML breaks the job schema; all problems are listed at once.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise JobError(f"job file {path} does not exist; give the path of a TOML job file") from error
    except IsADirectoryError as error:
        raise JobError(f"{path} is a folder; give the path of a TOML job file in it") from error
    except UnicodeDecodeError as error:
        raise JobError(f"job file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    try:
        mapping = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"job file {path} is no valid TOML: {error}; mend that line and run again") from error
    return LoadedJob(Job.from_mapping(mapping, source=str(path)), path.absolute().parent)


def resolve_path(path: str, folder: Path) -> str:
    """Make a path absolute as seen from a folder; an address with a scheme, such as ``s3://``, stays as it is."""
    if "://" in path:
        return path
    return os.path.normpath(folder / Path(path).expanduser())


def resolve(import_string: str, folder: Path | None = None) -> Any:
    """Import the object that an import string names.

    Parameters
    ----------
    import_string : str
        ``package.module:attribute``.
    folder : Path, optional
        The job file's folder, looked in first; then come the current folder and what is installed.

    Returns
    -------
    object
        The attribute.

    Raises
    ------
    JobError
        The module or attribute does not exist, importing it failed, or another module of that name was imported
        before. The message says where it was looked for and what to do.
    """
    module_name, colon, attribute = import_string.partition(":")
    if not (module_name and colon and attribute):
        raise JobError(f"{import_string!r} is no import string; write it as 'package.module:attribute'")
    with _import_folders(folder) as folders:
        _refuse_stale_module(module_name, import_string, folders)
        module = _import_module(module_name, import_string, folders)
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise JobError(_no_attribute(module, attribute, import_string)) from error


def make(factory: Factory, folder: Path | None = None, /, **extra: Any) -> Any:
    """Import a factory and call it with its arguments.

    Parameters
    ----------
    factory : Factory
        The import string and the keyword arguments of the job file.
    folder : Path, optional
        The job file's folder.
    **extra
        Keyword arguments that the caller adds.

    Returns
    -------
    object
        What the factory returns.

    Raises
    ------
    JobError
        The import string leads nowhere, the object cannot be called, or it does not take these arguments. What the
        factory itself raises passes through unchanged.
    """
    called = resolve(factory.factory, folder)
    if not callable(called):
        kind = type(called).__qualname__
        raise JobError(f"{factory.factory!r} is of type {kind}, which cannot be called; name a function")
    repeated = sorted(factory.arguments.keys() & extra.keys())
    if repeated:
        raise JobError(f"{factory.factory!r}: arguments {repeated} are set by kdcache; take them out of the job file")
    arguments = {**factory.arguments, **extra}
    _check_arguments(called, arguments, factory.factory)
    with _import_folders(folder):
        return called(**arguments)


def accepts(called: Any, name: str) -> bool:
    """Tell whether a callable takes a keyword argument of this name."""
    parameters = _parameters(called)
    if parameters is None:
        return False
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD or (key == name and parameter.kind in by_keyword)
        for key, parameter in parameters.items()
    )


@contextlib.contextmanager
def _import_folders(folder: Path | None) -> Iterator[list[str]]:
    folders = list(dict.fromkeys([*([str(folder)] if folder else []), str(Path.cwd())]))
    sys.path[:0] = folders
    importlib.invalidate_caches()
    try:
        yield folders
    finally:
        for entry in folders:
            with contextlib.suppress(ValueError):  # the imported code may have taken it out
                sys.path.remove(entry)


def _refuse_stale_module(module_name: str, import_string: str, folders: list[str]) -> None:
    """Refuse a module of these folders when another one of its name is already imported: the wrong code would run."""
    top = module_name.partition(".")[0]
    known = sys.modules.get(top)
    found = importlib.machinery.PathFinder.find_spec(top, folders)
    if known is None or found is None or found.origin is None:
        return
    known_file = getattr(known, "__file__", None)
    if known_file is not None and Path(known_file).resolve() == Path(found.origin).resolve():
        return
    raise JobError(
        f"{import_string!r} means {found.origin}, but another module named {top!r} is already imported in this "
        f"process, from {known_file or 'elsewhere'}. Give one of them another name, or run this job in a process "
        "of its own"
    )


def _import_module(module_name: str, import_string: str, folders: list[str]) -> ModuleType:
    looked = f"looked in {', '.join(folders)} and in the installed packages"
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise JobError(
                f"{import_string!r} cannot be imported: module {module_name!r} was found, but it imports "
                f"{error.name!r}, which is missing. Install it, or correct that import"
            ) from error
        raise JobError(
            f"{import_string!r} cannot be imported: there is no module {error.name!r}; {looked}. Put it beside the "
            "job file, run the command from the folder that holds it, or install its package"
        ) from error
    except Exception as error:
        raise JobError(
            f"{import_string!r} cannot be imported: module {module_name!r} failed while it was imported: "
            f"{type(error).__name__}: {error}. Correct the module; `python -c 'import {module_name}'` shows the error"
        ) from error


def _no_attribute(module: ModuleType, attribute: str, import_string: str) -> str:
    near = difflib.get_close_matches(attribute, dir(module), n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "define it there, or correct the job file"
    where = getattr(module, "__file__", None) or "a namespace package"
    return f"{import_string!r} cannot be imported: module {module.__name__!r} ({where}) has no {attribute!r}; {hint}"


def _parameters(called: Any) -> dict[str, inspect.Parameter] | None:
    try:
        return dict(inspect.signature(called).parameters)
    except (TypeError, ValueError):  # some builtins have no signature
        return None


def _check_arguments(called: Any, arguments: dict[str, Any], import_string: str) -> None:
    if _parameters(called) is None:
        return
    signature = inspect.signature(called)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        given = ", ".join(sorted(arguments)) or "none"
        raise JobError(
            f"{import_string!r} does not take the arguments given ({given}): {error}. Its signature is {signature}; "
            "correct `arguments` in the job file"
        ) from error
