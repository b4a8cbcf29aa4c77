"""Write the JSON Schemas and the job file's reference: `python -m kdcache.documents schemas docs/job-file.md`."""

from __future__ import annotations

import json
import pathlib
import sys

from kdcache.documents import DOCUMENTS, json_schema
from kdcache.documents.reference import job_reference


def main() -> None:
    """Write one schema file a document into the folder named first, and the reference page to the path named second."""
    folder = pathlib.Path(sys.argv[1])
    for page in sys.argv[2:]:
        pathlib.Path(page).write_text(job_reference())
    for name in DOCUMENTS:
        text = json.dumps(json_schema(name), indent=2, sort_keys=True) + "\n"
        (folder / f"{name}.schema.json").write_text(text)


if __name__ == "__main__":
    main()
