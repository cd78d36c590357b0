"""The records of jobs: every transition is one script, see ``lua/common.lua`` for the keys and the moves."""

from .connection import Connector
from .store import Held, Page, Settle, Standing, Store, Turn, WorkerInfo

__all__ = ["Connector", "Held", "Page", "Settle", "Standing", "Store", "Turn", "WorkerInfo"]
