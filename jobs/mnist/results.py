"""The results document: what was measured, student by student. Every table, picture and page is made from it alone."""

from __future__ import annotations

__all__ = ["CacheFigures", "Correction", "Results", "Student"]

import json
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from jobs.mnist.data import publish
from kdcache.documents.base import Document
from kdcache.errors import JobError

Count = Annotated[int, Field(ge=0)]
Digit = Annotated[int, Field(ge=0, le=9)]
ByDigit = Annotated[tuple[Count, ...], Field(min_length=10, max_length=10)]


class Correction(Document):
    """A student whose biases of some classes were set from the class frequencies, without labels."""

    title: ClassVar[str] = "correction"

    classes: tuple[Digit, ...]
    """The classes whose biases were set."""
    bias: tuple[float, ...]
    """What was added to each of them, in logits."""
    errors_by_digit: ByDigit


class Student(Document):
    """One trained student, on the test set."""

    title: ClassVar[str] = "student"

    sweep: str
    temperature: float | None = None
    soft_weight: float
    seed: int
    num_epochs: int
    errors_by_digit: ByDigit
    """After the last epoch."""
    lowest_num_errors: Count
    """At the best of the epochs that were tested: what choosing the epoch on the test set would have given."""
    corrections: tuple[Correction, ...] = ()

    @property
    def num_errors(self) -> int:
        """Test errors after the last epoch."""
        return sum(self.errors_by_digit)


class CacheFigures(Document):
    """The one cache that all students were trained from."""

    title: ClassVar[str] = "cache figures"

    num_examples: Count
    num_bytes: Count
    """Of the stored shards."""
    temperatures: tuple[float, ...]
    mean_kl: tuple[float, ...]
    """KL(teacher || decoded) at each temperature, mean over all rows, in nats."""
    max_kl: tuple[float, ...]


class Results(Document):
    """All that was measured."""

    title: ClassVar[str] = "MNIST results"

    format_version: Literal[1] = 1
    num_test_by_digit: ByDigit
    teacher_errors_by_digit: ByDigit
    cache: CacheFigures
    students: tuple[Student, ...]

    @property
    def num_test(self) -> int:
        """Test examples."""
        return sum(self.num_test_by_digit)

    def of(self, sweep: str) -> tuple[Student, ...]:
        """Give the students of a sweep.

        Raises
        ------
        JobError
            There are none.
        """
        found = tuple(student for student in self.students if student.sweep == sweep)
        if not found:
            raise JobError(f"the results hold no student of sweep {sweep!r}; run `python -m jobs.mnist` to train it")
        return found

    def write(self, path: Path) -> None:
        """Write the document as JSON, a student a line, completely or not at all."""
        mapping = self.to_mapping()
        students = ",\n".join(f"  {json.dumps(student)}" for student in mapping.pop("students"))
        head = json.dumps(mapping, indent=1).removesuffix("\n}")
        publish(f'{head},\n "students": [\n{students}\n ]\n}}\n'.encode(), path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a document that `write` wrote.

        Raises
        ------
        JobError
            There is no such file.
        DocumentError
            The file is no such document.
        """
        if not path.is_file():
            raise JobError(f"{path} does not exist; run `python -m jobs.mnist` from the repository root to make it")
        return cls.from_json(path.read_bytes(), source=str(path))
