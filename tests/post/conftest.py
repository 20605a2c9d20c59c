"""Folders of models, for all tests of curation."""

from __future__ import annotations

import pytest

from llamax import loading
from tests.post.small import Models


@pytest.fixture
def models(tmp_path, monkeypatch) -> Models:
    models = Models(tmp_path / "models")
    monkeypatch.setattr(loading, "find", models.find)
    monkeypatch.setattr(loading, "load", models.load)
    return models
