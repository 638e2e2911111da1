"""The tables that only a catalog in SQLite has: those of ``attributes`` and ``lexical``."""

from __future__ import annotations

import sqlalchemy as sa

own_metadata = sa.MetaData()
