"""Download JSON or YAML for task sources, which keep it in a cache folder."""

import json
import os
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import yaml  # comes with transformers

from support import UserError


def cache_folder(name: str) -> Path:
    """The folder for downloads."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "text-to-lora" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def download(url: str, needed_for: str, parse=json.loads):
    """The JSON at a URL, or what `parse` makes of it; waits if the server asks for it (HTTP 429).

    Raises UserError, which says what the file was needed for.
    """
    for wait in (1, 2, 4, 8, None):  # seconds; None: the last attempt
        try:
            with urlopen(url, timeout=60) as response:
                return parse(response.read())
        except (OSError, HTTPException, ValueError, yaml.YAMLError) as e:
            asked_to_wait = isinstance(e, HTTPError) and e.code == 429
            if not asked_to_wait or wait is None:
                raise UserError(f"{needed_for}, and {url} cannot be read: {e or type(e).__name__}") from None
            said = e.headers.get("Retry-After", "")  # seconds, or a date
            time.sleep(int(said) if said.isdigit() else wait)


PUBLISHED = "https://raw.githubusercontent.com/SakanaAI/text-to-lora/main"  # the repository of the paper


def published(file: str, needed_for: str) -> dict:
    """A YAML file of the published repository."""
    content = download(f"{PUBLISHED}/{file}", needed_for, yaml.safe_load)
    if not isinstance(content, dict):
        raise UserError(f"{needed_for}, and {PUBLISHED}/{file} is no list of settings")
    return content
