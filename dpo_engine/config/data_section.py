"""The section `data` of a run's configuration, and the sources of records in it."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dpo_engine.config.paths import Place
from dpo_engine.config.section import Count, Fraction, Natural, Section, Text

Columns = Annotated[dict[Text, Text | None], Field(min_length=1)]


def _distinct(columns: dict[str, str | None] | None) -> dict[str, str | None] | None:
    """Return `columns`. Raises ValueError if two entries use the same field of the records."""
    used = [column for column in (columns or {}).values() if column is not None]
    twice = next((column for column in used if used.count(column) > 1), None)
    if twice is not None:
        raise ValueError(f"a mapping that uses each field once, but {twice} is used twice")
    return columns


class Source(Section):
    """One source of preference records: one or several files."""

    path: Place
    """the path of a file or directory, a glob, or a Hub id org/name:split; a slice such as [-5%:] may follow"""
    format: Text = "auto"
    """name of a registered data format; auto: the format is detected from the first usable record"""
    columns: Columns | None = None
    """renaming of fields for this source, instead of data.columns; null: data.columns applies"""

    @field_validator("columns", mode="after")
    @classmethod
    def _used_once(cls, columns: Columns | None) -> Columns | None:
        return _distinct(columns)


class TrainSource(Source):
    """One source of preference records to train on."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """sampling weight of this source's pairs, relative to the other sources"""


class DataConfig(Section):
    train: Annotated[tuple[TrainSource, ...], Field(min_length=1, strict=False)]
    """a source of preference records, or a list of sources; a source is a path or a mapping {path, format, columns,
    weight}"""
    validation: Annotated[tuple[Source, ...], Field(min_length=1, strict=False)] | None = None
    """a source or a list of sources, as in data.train but without weights, for evaluation only; null: no such source"""
    validation_fraction: Fraction = 0.0
    """approximate fraction of the prompts in data.train to hold out for evaluation; requires data.validation=null"""
    max_pairs: Count | None = None
    """maximum number of training pairs; the first usable pairs of data.train are kept; null: no limit"""
    max_length: Annotated[int, Field(ge=2)] = 2048
    """maximum total number of tokens in a prompt and one response, including EOS"""
    max_prompt_length: Count | None = None
    """maximum number of tokens in a prompt; null: limited by max_length only"""
    max_completion_length: Count | None = None
    """maximum number of tokens in a response; a pair with a longer response is dropped; null: limited by max_length
    only"""
    truncation: Literal["left", "drop"] = "left"
    """what to do with overlong pairs: cut the start of the prompt (left), or drop the pair (drop); responses are never
    cut, so a pair with an overlong response is always dropped"""
    chat_template: Place | None = None
    """path of a Jinja chat template; null: the tokenizer's own template"""
    add_eos: bool | Literal["auto", "always"] = "auto"
    """whether to end each response with the EOS token; auto (or true): yes, unless the chat template has already ended
    the turn with another end token; always: yes, also after such an end token"""
    score: Literal["response", "all"] = "response"
    """tokens to score: those of the assistant turns in the response (response), or all tokens of prompt and response
    except the first (all)"""
    on_template_fault: Literal["error", "allow"] = "error"
    """what to do with a pair if the chat template drops or moves its text, drops its tools, or writes the header of a
    turn into or after a response: end the run (error), or use the pair and count it in the log (allow)"""
    template_date: Text | None = None
    """date, in the form YYYY-MM-DD, that chat templates read instead of the current date; null: the date of the run's
    first start"""
    cache_dir: Place | None = None
    """directory for tokenized data; null: <train.output_dir>/cache"""
    workers: Count | None = None
    """number of tokenizing processes that the first rank on each node starts; null: one process per core that this rank
    may use, at most 32, and fewer for small files"""
    on_bad_line: Literal["error", "skip"] = "error"
    """what to do with unusable records: end the run (error), or skip and count them (skip)"""
    columns: Columns | None = None
    """renaming of fields: {prompt: question} reads the field question as prompt, and {image: null} leaves out the field
    image; null: no renaming"""
    seed: Natural = 0
    """random seed for the order of the pairs"""
    shuffle: bool = True
    """whether to put the pairs into a new random order in each epoch; false: the pairs keep the order of the sources
    and files"""
    group_by_prompt: bool = False
    """whether to keep pairs with the same source and the same prompt together, so that these pairs can share one copy
    of the prompt in the tree layout"""

    @field_validator("template_date")
    @classmethod
    def _date(cls, value: str | None) -> str | None:
        try:
            return value and datetime.date.fromisoformat(value).isoformat()
        except ValueError as error:
            raise ValueError("a date, YYYY-MM-DD, for example 2026-01-31") from error

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [value]
        if isinstance(value, (list, tuple)):
            return tuple({"path": item} if isinstance(item, str) else item for item in value)
        return value

    @field_validator("columns", mode="after")
    @classmethod
    def _used_once(cls, columns: Columns | None) -> Columns | None:
        return _distinct(columns)

    @model_validator(mode="after")
    def _spread_columns(self) -> DataConfig:
        """Copy the value of `data.columns` to `columns` of every source that has no `columns`."""
        if self.columns is not None:
            for name in ("train", "validation"):
                sources = getattr(self, name) or ()
                shared = {"columns": self.columns}
                spread = tuple(item if item.columns else item.model_copy(update=shared) for item in sources)
                object.__setattr__(self, name, spread or None)  # the section is frozen
        return self
