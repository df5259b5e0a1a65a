"""The message about a package that only an extra installs."""

from __future__ import annotations

import sys

import pytest

from diptych.handlers import FirstLayerFilters
from diptych.handlers.extras import check_extra


def test_an_installed_package_is_accepted():
    check_extra("images", "torch", needed_by="pictures")


def test_without_the_package_the_error_names_its_user_and_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)

    with pytest.raises(ImportError, match=r"FirstLayerFilters needs .* PIL.*diptych\[images\]"):
        FirstLayerFilters()
