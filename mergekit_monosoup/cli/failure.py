"""Turn errors of a user's making into one message instead of a traceback."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

LOG = logging.getLogger(__name__)


@contextmanager
def reported_errors() -> Iterator[None]:
    """Show expected errors as `Error: ...` with exit status 1; with `-vv`, their traceback too.

    Expected are our own errors and those that mergekit, pydantic, yaml, safetensors and the file
    system raise for a wrong recipe or a damaged checkpoint.
    """
    import pickle

    import yaml
    from huggingface_hub.errors import StrictDataclassError
    from pydantic import ValidationError
    from safetensors import SafetensorError

    from mergekit_monosoup.checkpoint.headers import unreadable_pickle
    from mergekit_monosoup.errors import MonoSoupError

    try:
        yield
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in item['loc']) or 'configuration'}: {item['msg']}"
            for item in error.errors()
        ]
        _fail("the recipe is not valid:\n  " + "\n  ".join(lines), error)
    except yaml.YAMLError as error:
        _fail(f"the recipe is not valid YAML: {error}", error)
    except pickle.UnpicklingError as error:
        _fail(str(unreadable_pickle(Path("a file of weights"), error)), error)
    except KeyError as error:
        _fail(f"missing key {error}", error)
    except (MonoSoupError, RuntimeError, ValueError, SafetensorError, StrictDataclassError, OSError) as error:
        _fail(str(error), error)


def _fail(message: str, error: BaseException) -> None:
    LOG.debug("caused by", exc_info=error)
    raise click.ClickException(printable(message)) from error


def printable(text: str) -> str:
    """Return a text without the control characters that a terminal would obey; line ends stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
