"""Source ``retrieval``: queries, documents, and judgements of how well these fit, for sentence encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from mlorq.artifacts.locations import resolve_location
from mlorq.data.metrics import RANKING
from mlorq.data.model_inputs import text_inputs
from mlorq.data.source import SOURCES, DataSource, MetricSettings, ModelSettings, Role, SamplesSettings, TokenSettings
from mlorq.errors import DataError
from mlorq.models.tasks import PAIRS

if TYPE_CHECKING:
    from mlorq.data.base import Dataset

IDENTITY, TEXT = "id", "text"  # columns of queries and documents
JUDGED = ("query", "document", "grade")  # columns of judgements


class RetrievalSettings(TokenSettings, SamplesSettings, MetricSettings):
    """Keys of the three tables of a search."""

    queries: str | None = Field(None, description="CSV, TSV or Parquet table with columns id and text")
    documents: str | None = Field(None, description="the same of the documents")
    judgements: str | None = Field(
        None, description="table with columns query, document and grade: numbers, above zero if the document fits"
    )


class RetrievalSource(DataSource[RetrievalSettings]):
    """Texts of a search: queries and documents."""

    name = "retrieval"
    settings = RetrievalSettings
    needed = ("queries", "documents")

    def check_role(self, settings: RetrievalSettings, role: Role) -> None:
        """Evaluation data needs judgements, and all queries."""
        if role == "evaluation":
            if settings.judgements is None:
                raise ValueError(f"judgements: source {self.name} needs them in evaluation data")
            if settings.samples is not None:
                raise ValueError("samples: the metric needs all queries and documents; leave it out")

    def locations(self, settings: RetrievalSettings) -> Sequence[str | None]:
        """The three tables."""
        return settings.queries, settings.documents, settings.judgements

    def load(self, settings: RetrievalSettings, role: Role, model: ModelSettings, folder: str, seed: int) -> Dataset:
        """Load the texts as batches of tokens; see ``DataSource.load``."""
        from mlorq.data.rankings import read_judgements, read_texts, search_dataset

        if settings.metric not in (None, RANKING):
            raise DataError(f"metric {settings.metric!r} does not fit a search; choose {RANKING}")
        inputs = text_inputs(model, folder, self.name)
        if not inputs.pairs:
            raise DataError(f"source {self.name} is for models with task {PAIRS}; use source table")
        assert settings.queries is not None
        assert settings.documents is not None
        queries = read_texts(resolve_location(settings.queries, folder))
        documents = read_texts(resolve_location(settings.documents, folder))
        judgements = None
        if role == "evaluation":
            assert settings.judgements is not None
            judgements = read_judgements(resolve_location(settings.judgements, folder), queries, documents)
        return search_dataset(queries, documents, judgements, settings, inputs, seed)


SOURCES.register(RetrievalSource())
