"""JSONL files, and results in them that survive an interruption.

Rank 0 appends whole lines, and --resume skips the records that are there.
"""

import json
from pathlib import Path

from plumbing.folder import append_jsonl, hold, make_folder, refuse_unusable
from plumbing.ranks import all_gather, barrier, fail, rank, require


class Records:
    """A file with one finished record per line. `config` has the flags --overwrite and --resume.

    `open` locks it, `begin` clears it, `append` adds to it. Call these on every rank.
    """

    def __init__(
        self, path: Path, config, key: tuple[str, ...] = ("id",), lock: Path | None = None
    ):
        """Refuse a file that holds records, unless a flag says what to do with them.

        `key` names the fields that tell records apart. `lock` is the lock file, which several files
        may share. By default it is beside the file.
        """
        self.path, self.config, self.key = Path(path), config, key
        self._refuse_occupied()
        self.lock = lock or self.path.with_name(f".{self.path.name}.lock")
        self.done = None

    def _refuse_occupied(self):
        refuse_unusable(self.path)
        example = self.path / "plans.jsonl"
        require(not self.path.is_dir(), f"{self.path} is a folder; give a file such as {example}")
        fit = self.path.is_file() or not self.path.exists()
        require(fit, f"{self.path} is a device or a pipe; choose another --out")
        holds_records = self.path.exists() and self.path.stat().st_size
        require(
            self.config.overwrite or self.config.resume or not holds_records,
            f"{self.path} already holds records: choose another --out, pass --resume to go on, or "
            "--overwrite to replace it",
        )
        require(
            not (self.config.overwrite and holds_records) or self._is_ours(),
            f"{self.path} does not hold records of ours, which alone --overwrite replaces: move it "
            "away, or choose another --out",
        )

    def _is_ours(self) -> bool:
        """Whether the first line is a record, or the beginning of one that was cut off."""
        with open(self.path, "rb") as file:
            line = file.readline(1 << 26)
        try:
            record = json.loads(line)
            return isinstance(record, dict) and all(name in record for name in self.key)
        except ValueError:
            return line.startswith(b'{"') and not line.endswith(b"\n")

    def open(self) -> set[tuple[str, ...]]:
        """Lock the file. Returns the keys of its finished records, the same on every rank.

        A last line that was cut off in mid-write is removed, and nothing else. Call it after
        init_distributed. Raises SystemExit if another process holds the lock.
        """
        if rank() == 0:
            make_folder(self.path.parent)
        hold(self.lock)
        self._refuse_occupied()  # again: another run may have ended before this one had the lock
        done = self._finished() if rank() == 0 and not self.config.overwrite else set()
        self.done = all_gather(done)[0]
        return self.done

    def _finished(self) -> set[tuple[str, ...]]:
        if not self.path.exists():
            return set()
        data = self.path.read_bytes()
        if not data.endswith(b"\n"):
            self.path.write_bytes(data[:data.rfind(b"\n") + 1])
        records = load_jsonl(self.path)
        missing = [name for name in self.key if any(name not in record for record in records)]
        require(
            not missing,
            f"{self.path} holds records of an older form, without `{', '.join(missing)}`: choose "
            "another --out or pass --overwrite",
        )
        return {tuple(str(record[name]) for name in self.key) for record in records}

    def begin(self) -> set[tuple[str, ...]]:
        """With --overwrite, remove the old file, once every rank is here. Returns what `open` does.

        Call it when all that can be wrong has been read, models included. It opens the file if that
        has not been done.
        """
        if self.done is None:
            self.open()
        barrier()
        if rank() == 0 and self.config.overwrite:
            self.path.unlink(missing_ok=True)
        return self.done

    def append(self, *records: dict):
        """Write finished records (rank 0): all of them or, on a full disk, none, and fail."""
        try:
            append_jsonl(self.path, list(records))
        except OSError as error:
            fail(
                f"{self.path} cannot be written ({error.strerror}): make room or mend the folder, "
                "then go on with --resume"
            )

    def read(self) -> list[dict]:
        return load_jsonl(self.path) if self.path.exists() else []


def load_jsonl(path: Path) -> list[dict]:
    """The objects of a JSONL file, each with its line number as `_line`. Blank lines are skipped.

    Raises SystemExit with file, line and reason for what is not UTF-8, not JSON (NaN and Infinity
    are not), or no object.
    """

    def not_a_number(name: str):
        raise ValueError(f"{name} is no JSON number")

    records = []
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                line.encode()  # fails on the stand-ins for bytes that are not UTF-8
                record = json.loads(line, parse_constant=not_a_number)
            except UnicodeEncodeError:
                remedy = "convert the file first, such as with `iconv -f LATIN1 -t UTF-8`"
                fail(f"{where}: not UTF-8; {remedy}")
            except (ValueError, RecursionError) as error:  # an integer of over 4,300 digits, too
                fail(f"{where}: not JSON ({error}); mend or remove the line")
            kind = type(record).__name__
            require(kind == "dict", f"{where}: want one JSON object per line, not a {kind}")
            records.append({"_line": number, **record})
    return records
