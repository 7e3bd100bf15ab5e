"""The settings of a recipe's text: its sources, what is held out, how it is laid out. Imports no torch.

`nha_convert.settings` has the rest of a recipe.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, field_validator, model_validator

from .settings_types import Count, Positive, Settings, Tokens


class SourceSettings(Settings):
    """One source of training text.

    Attributes:
        source: `stdlib` (this Python's own sources), `recall` (made documents that only memory can predict), `text`
            (files of plain text), `dataset` (rows with a column of text) or `chat` (rows with conversations).
        name: what `stages.N.sources` calls it; the source's kind where it has none.
        weight: its share of what is trained on, relative to the other sources.
        path: `text`: a file, glob or folder of .txt. `dataset`, `chat`: a .jsonl, .parquet or .arrow file, glob, folder
            or URL, a folder of `save_to_disk`, a Hub id, or `json`, `parquet`, `arrow`, `csv` with `data_files`.
        config, revision: of a Hub dataset.
        data_files: files, globs or URLs of that dataset or format.
        streaming: read a Hub dataset as it comes; false downloads it first.
        split: its split.
        far: `recall`: share of its documents that ask from afar: they state everything before they ask for any of it,
            from 512 tokens to the row's length apart; the others ask all along.
        column: the column of the text, or of the conversation: a list of {role, content}.
        prompt, response: `chat`: two columns of text instead of a conversation.
    """

    source: Literal["stdlib", "recall", "text", "dataset", "chat"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] | None = None
    weight: Positive = 1.0
    path: str | None = None
    config: str | None = None
    revision: str | None = None
    data_files: list[str] | None = None
    streaming: StrictBool = True
    split: str = "train"
    column: str = "text"
    prompt: str | None = None
    response: str | None = None
    far: Annotated[float, Field(ge=0, le=1)] = 0.0

    @property
    def label(self) -> str:
        """What stages and messages call it."""
        return self.name or self.source

    @model_validator(mode="before")
    @classmethod
    def _conversations_are_messages(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("source") == "chat":
            return {"column": "messages", **data}
        return data

    @model_validator(mode="after")
    def _path_where_needed(self) -> SourceSettings:
        if self.source in ("stdlib", "recall") and self.path:
            raise ValueError(f"`source: {self.source}` takes no `path`, found {self.path!r}; use `source: text`")
        if self.source == "text" and not self.path:
            raise ValueError("`source: text` needs `path`: a file, a glob or a folder of .txt")
        if self.source in ("dataset", "chat") and not self.path:
            raise ValueError(f"`source: {self.source}` needs `path`: a Hub id, or a .jsonl, .parquet or .arrow file")
        if self.data_files is not None and (not self.data_files or self.source not in ("dataset", "chat")):
            raise ValueError(
                f"`data_files` lists the files of a `dataset` or `chat` source, found {self.data_files!r} for "
                f"`source: {self.source}`; leave it out or name a file"
            )
        if self.far and self.source != "recall":
            raise ValueError(f"`far` belongs to `source: recall`, found `source: {self.source}`")
        if (self.prompt is None) != (self.response is None):
            raise ValueError("`prompt` and `response` are two columns that go together; give both or neither")
        if self.prompt is not None and self.source != "chat":
            raise ValueError(f"`prompt` and `response` belong to `source: chat`, found `source: {self.source}`")
        return self


class DataSettings(Settings):
    """Where training and held-out text come from, and how it is laid out.

    Attributes:
        held_out_tokens: what is kept from training, for the evaluation.
        packing: `windows` cuts random windows out of each source's stream of text; `documents` packs whole documents
            into rows, none of which sees another, and goes through all of them before any comes again.
        workers: processes that tokenise; 1 stays in this one.
        cache: folder of tokenised text; None is `nha_convert` in the cache of `datasets`.
    """

    sources: Annotated[list[SourceSettings], Field(min_length=1)]
    held_out_tokens: Tokens = 32768
    packing: Literal["windows", "documents"] = "windows"
    workers: Count = 1
    cache: str | None = None

    @field_validator("sources")
    @classmethod
    def _some_text(cls, sources: list[SourceSettings]) -> list[SourceSettings]:
        if all(source.source == "recall" for source in sources):
            raise ValueError("`recall` documents are filled with text; add one of `stdlib`, `text` or `dataset`")
        return sources

    def of_stage(self, names: list[str] | None) -> list[SourceSettings]:
        """The sources that a stage reads: those with the given names, or all where none are given.

        Raises:
            ValueError: no source has one of the names.
        """
        if names is None:
            return list(self.sources)
        there = [source.label for source in self.sources]
        for name in names:
            if name not in there:
                raise ValueError(f"no source of `data.sources` is named {name!r}; allowed: {', '.join(there)}")
        return [source for source in self.sources if source.label in names]
