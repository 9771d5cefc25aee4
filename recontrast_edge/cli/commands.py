"""All commands, in the order that ``--help`` lists them; importing one registers it."""

from __future__ import annotations
