"""Write the JSON Schemas: `python -m kdcache.documents FOLDER`."""

from __future__ import annotations

import json
import pathlib
import sys

from kdcache.documents import DOCUMENTS, json_schema


def main() -> None:
    """Write one schema file a document into the folder named on the command line."""
    folder = pathlib.Path(sys.argv[1])
    for name in DOCUMENTS:
        text = json.dumps(json_schema(name), indent=2, sort_keys=True) + "\n"
        (folder / f"{name}.schema.json").write_text(text)


if __name__ == "__main__":
    main()
