"""Refuse a virtual environment whose editable install is of another checkout: its commands would run that one's code.

Run by the Makefile as `python .ci/check_venv.py VENV`, before anything is installed.
"""

import json
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

HERE = Path(__file__).resolve().parent.parent


def main(venv: Path) -> int:
    for record in venv.glob("lib*/python*/site-packages/ether_diffusion-*.dist-info/direct_url.json"):
        url = urlparse(json.loads(record.read_text(encoding="utf-8"))["url"])
        owner = Path(unquote(url.path)).resolve()
        if owner != HERE:
            line = (
                f"VENV={venv}: it belongs to the checkout {owner}, not to {HERE}. Give another VENV, or leave it out."
            )
            print(line, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
