"""Offline on-policy distillation for the Hugging Face stack.

The names below are the public API. Each is imported on first use, so that `import trl_lopd` costs milliseconds and
loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_MODULE_OF = {
    "OfflineOPDConfig": "config",
    "OfflineOPDTrainer": "trainer",
    "TableError": "table",
    "TableSummary": "table",
    "TeacherConsistencyError": "consistency",
    "TeacherFingerprint": "fingerprint",
    "check_teacher_consistency": "consistency",
    "collect_rollouts": "rollouts",
    "fingerprint_teacher": "fingerprint",
    "read_model_card": "cards",
    "score_rollouts": "scoring",
    "stamp_model_card": "cards",
    "table_features": "table",
    "validate_table": "table",
}

__all__ = list(_MODULE_OF)

if TYPE_CHECKING:
    from .cards import read_model_card, stamp_model_card
    from .config import OfflineOPDConfig
    from .consistency import TeacherConsistencyError, check_teacher_consistency
    from .fingerprint import TeacherFingerprint, fingerprint_teacher
    from .rollouts import collect_rollouts
    from .scoring import score_rollouts
    from .table import TableError, TableSummary, table_features, validate_table
    from .trainer import OfflineOPDTrainer


def __getattr__(name: str):
    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
