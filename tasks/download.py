"""Downloads of task sources: JSON, once, into a cache."""

import json
import os
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from support import UserError


def cache_folder(name: str) -> Path:
    """The folder for downloads."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "text-to-lora" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def download(url: str, needed_for: str):
    """The JSON at a URL; waits if the server asks for it (HTTP 429).

    Raises UserError, which says what the file was needed for.
    """
    for wait in (1, 2, 4, 8, None):  # seconds; None: the last attempt
        try:
            with urlopen(url, timeout=60) as response:
                return json.loads(response.read())
        except (OSError, HTTPException, ValueError) as e:
            asked_to_wait = isinstance(e, HTTPError) and e.code == 429
            if not asked_to_wait or wait is None:
                raise UserError(f"{needed_for}, and {url} cannot be read: {e or type(e).__name__}") from None
            said = e.headers.get("Retry-After", "")  # seconds, or a date
            time.sleep(int(said) if said.isdigit() else wait)
