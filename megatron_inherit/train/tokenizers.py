"""Whether model, teacher and data speak of the same tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_inherit.base.log import get_logger
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.checkpoint.files import file_pool
from megatron_inherit.checkpoint.stream import SideFile
from megatron_inherit.data.manifests import TokenizerRecord
from megatron_inherit.data.tokenizer import made_the_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_inherit.train.preflight import RunPlan

logger = get_logger(__name__)


def warn_of_other_tokenizers(plan: RunPlan, record: TokenizerRecord | None) -> None:
    """Warns where the files beside the model or its teacher are not those that made the data's token ids.

    Vocabularies of one size hide the mistake: every id is valid and means something else.

    Args:
        plan: The resolved recipe.
        record: What the data's manifest says of its tokenizer, None where it says nothing.
    """
    if record is None:
        return
    if plan.source is not None:
        _compare("model.path", plan.source.side_files, record)
    if plan.config.distill.teacher is not None:
        with open_source(plan.config.distill.teacher) as teacher:
            _compare("distill.teacher", teacher.side_files, record)


def _compare(key: str, files: Sequence[SideFile], record: TokenizerRecord) -> None:
    with file_pool() as pool:
        contents = {file.name: file.read(pool) for file in files}
    if made_the_ids(record, contents) is False:
        logger.warning(
            "%s: its tokenizer is not the one that made the tokens of data.path (%s). Where an id means another token, "
            "training fails without an error: tokenize the data with the model's own files.",
            key,
            record.path,
        )
