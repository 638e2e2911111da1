"""The parts of a bank that tests look into. Only this file knows their private names."""

from __future__ import annotations

from bank_service.bank import Bank
from bank_service.bank_stats import publish as publish_figures
from bank_service.records.discarder import Discarder
from bank_service.records.stores import Pools, Stores
from bank_service.runtime.background import Background
from bank_service.runtime.metrics import BankMetrics
from bank_service.search.cue_finder import CueFinder
from bank_service.upkeep.upkeep import Upkeep


def stores(bank: Bank) -> Stores:
    return bank._stores


def pools(bank: Bank) -> Pools:
    return bank._pools


def discarder(bank: Bank) -> Discarder:
    return bank._discarder


def background(bank: Bank) -> Background:
    return bank._background


def cue_finder(bank: Bank) -> CueFinder:
    return bank._cues


def upkeep(bank: Bank) -> Upkeep:
    return bank._upkeep


def publish(bank: Bank, metrics: BankMetrics) -> None:
    """Writes the bank's figures into the metrics, as it does for itself once it is open."""
    publish_figures(metrics, bank._acknowledged, bank._nearest, bank._upkeep.eraser, bank._stores, bank._data_dir)
