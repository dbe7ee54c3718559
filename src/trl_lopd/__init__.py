"""Offline on-policy distillation for the Hugging Face stack.

The names below are the public API. Each is imported on first use, so that `import trl_lopd` costs milliseconds and
loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_MODULE_OF = {
    "EffOPDCallback": "effopd",
    "OfflineOPDConfig": "config",
    "OfflineOPDError": "errors",
    "OfflineOPDTrainer": "trainer",
    "RewardGate": "gates",
    "SGLangServer": "served",
    "ShardError": "shards",
    "TableError": "table",
    "TableSummary": "table",
    "TeacherConsistencyError": "consistency",
    "ServerError": "served",
    "TeacherFingerprint": "fingerprint",
    "TeacherStampCallback": "stamp",
    "VLLMServer": "served",
    "Verdict": "consistency",
    "check_teacher_consistency": "consistency",
    "collect_rollouts": "rollouts",
    "evaluate_model": "evaluation",
    "fingerprint_teacher": "fingerprint",
    "generate_sft_data": "rollouts",
    "load_benchmark": "evaluation",
    "load_table": "cards",
    "read_dataset_card": "cards",
    "read_model_card": "cards",
    "score_rollouts": "scoring",
    "stamp_dataset_card": "cards",
    "stamp_model_card": "cards",
    "table_features": "table",
    "validate_table": "table",
    "verify_served_teacher": "probes",
}

__all__ = list(_MODULE_OF)

if TYPE_CHECKING:
    from .cards import load_table, read_dataset_card, read_model_card, stamp_dataset_card, stamp_model_card
    from .config import OfflineOPDConfig
    from .consistency import TeacherConsistencyError, Verdict, check_teacher_consistency
    from .effopd import EffOPDCallback
    from .errors import OfflineOPDError
    from .evaluation import evaluate_model, load_benchmark
    from .fingerprint import TeacherFingerprint, fingerprint_teacher
    from .gates import RewardGate
    from .probes import verify_served_teacher
    from .rollouts import collect_rollouts, generate_sft_data
    from .scoring import score_rollouts
    from .served import ServerError, SGLangServer, VLLMServer
    from .shards import ShardError
    from .stamp import TeacherStampCallback
    from .table import TableError, TableSummary, table_features, validate_table
    from .trainer import OfflineOPDTrainer


def __getattr__(name: str):
    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
