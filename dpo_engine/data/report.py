"""Count the records and pairs of a data set that were kept, dropped or changed, and describe them for the log."""

from __future__ import annotations

from dataclasses import dataclass, field

from dpo_engine.data.encode import REPEATED, Encoded

COUNTED = ("cut", "merged", "masked", "repeated")
"""Fields of :class:`~dpo_engine.data.encode.Encoded` that the report counts under the same name."""


@dataclass
class Report:
    """Statistics of a data set. `str()` gives a few lines for the log.

    read      number of records read, including bad ones
    kept      number of pairs in the data set
    dropped   number of dropped pairs by reason; records that the data format leaves out are counted here too
    cut       number of pairs whose prompt was truncated on the left
    merged    number of pairs whose prompt lost its last tokens, because these tokens change if a response follows
              (:func:`~dpo_engine.data.encode.encode_pairs`)
    ends      number of pairs by the end-of-turn tokens with which their responses end
    faults    number of pairs whose text the chat template changes, by the kind of change
    masked    number of pairs in which some tokens of a response are not scored
    repeated  number of text pairs whose two responses begin with the whole prompt
    bad       number of records that cannot be used; `bad_lines` holds the first few errors
    copies    number of pairs with the same tokens as an earlier pair
    lengths   median, 95th percentile and maximum of the number of tokens in the prompt, in each response, and in the
              prompt with the longer response
    sources   name and number of pairs of each source
    stopped   whether usable pairs were left out because the limit on the number of pairs was reached
    shared    if the limit was reached within a record, the number of this record's kept pairs and the number of its
              usable pairs; otherwise None
    cached    whether the pairs were read from the cache
    """

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    cut: int = 0
    merged: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    masked: int = 0
    repeated: int = 0
    bad: int = 0
    bad_lines: list[str] = field(default_factory=list)
    copies: int = 0
    lengths: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    sources: list[tuple[str, int]] = field(default_factory=list)
    stopped: bool = False
    shared: tuple[int, int] | None = None
    cached: bool = False

    def count(self, encoded: Encoded) -> None:
        """Count the properties of a kept pair. The caller counts the number of kept pairs."""
        for name in COUNTED:
            setattr(self, name, getattr(self, name) + getattr(encoded, name))
        end = " and ".join(sorted(encoded.ends)) or "no end token"
        self.ends[end] = self.ends.get(end, 0) + 1
        for fault in encoded.faults:
            self.faults[fault] = self.faults.get(fault, 0) + 1

    def __str__(self) -> str:
        lines = [f"{counted(self.kept, 'pair')} from {counted(self.read, 'record')}"]
        if self.cached:
            lines[0] += ", from the cache"
        if len(self.sources) > 1:
            lines.append("  " + ", ".join(f"{name}: {count:,}" for name, count in self.sources))
        if self.stopped:
            lines.append(f"  stopped after {counted(self.kept, 'pair')} (data.max_pairs): later records are not used")
        if self.shared:
            kept, whole = self.shared
            share = "is kept, with the record's whole weight" if kept == 1 else "are kept and share the record's weight"
            lines.append(f"  the last record has {whole:,} pairs; {kept:,} of them {share}")
        lines += [f"  {count:,} dropped: {reason}" for reason, count in self.dropped.items()]
        if self.copies:
            lines.append(f"  {counted(self.copies, 'duplicate pair')} (kept)")
        if self.cut:
            lines.append(f"  {counted(self.cut, 'prompt')} truncated on the left")
        if self.merged:
            lines.append(f"  {counted(self.merged, 'prompt')} lost the last tokens, which change if a response follows")
        if self.ends:
            lines.append(
                f"  responses end with {', '.join(f'{name} ({count:,})' for name, count in self.ends.items())}"
            )
        if self.masked:
            lines.append(f"  {counted(self.masked, 'pair')} with unscored turns in a response")
        if self.repeated:
            lines.append(f"  {counted(self.repeated, 'pair')} {REPEATED}")
        lines += [f"  {counted(count, 'pair')}: the chat template {fault}" for fault, count in self.faults.items()]
        lengths = ", ".join(f"{name} {' / '.join(map(str, three))}" for name, three in self.lengths.items())
        lines.append(f"  tokens (median / p95 / max): {lengths}")
        if self.bad:
            shown = "" if self.bad <= len(self.bad_lines) else f", first {len(self.bad_lines)}"
            lines += [f"  {counted(self.bad, 'bad line')} skipped{shown}:", *("    " + line for line in self.bad_lines)]
        return "\n".join(lines)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural if the number is not 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
