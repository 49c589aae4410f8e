"""``moejax export``: a run's model as a Hugging Face checkpoint."""

import pathlib
from collections.abc import Mapping
from typing import Any

from moejax.config import UserError
from moejax.data import tokenizers
from moejax.interop.hf import save
from moejax.interop.source import RECORD
from moejax.interop.tokenizer_files import tokenizer_files
from moejax.output_folder import check_new_folder
from moejax.training import restore, run_dir
from moejax.training.import_command import FOLDER


def export_checkpoint(
    workdir: str, hf: str, *, family: str | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """Writes the newest good checkpoint of a run in the Hugging Face format.

    An imported run keeps the config.json, the tensors' types and the tokenizer files that it came
    with. Another run is written as the first family that holds its model, with its tokenizer.

    Args:
      workdir: the run's folder.
      hf: folder for the checkpoint, new or empty.
      family: ``model_type`` to write.
      dtype: type of the weights; None is that of the imported checkpoint, or float32.

    Returns:
      ``hf`` and ``files``.

    Raises:
      UserError: no run, no checkpoint, a model that no family holds, or a folder that is not free.
    """
    target, run = check_new_folder(hf, f"--hf = {hf!r}"), pathlib.Path(workdir)
    config, variables = restore.load(workdir)
    imported = (run / FOLDER / RECORD).is_file()
    more, files = ({}, {}) if imported else _around(run, config.train.seq_len)
    save(
        target, config.model, variables, like=run / FOLDER if imported else None, family=family,
        dtype=dtype, more=more, files=files,
    )  # fmt: skip
    return {"hf": str(target), "files": sorted(path.name for path in target.iterdir())}


def format_export(result: Mapping[str, Any]) -> str:
    """What was written."""
    return f"{result['hf']}: {', '.join(result['files'])}"


def _around(run: pathlib.Path, seq_len: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Fields and files of a checkpoint that was trained here."""
    tokenizer = tokenizers.load_saved(run / run_dir.TOKENIZER)
    end = tokenizer.separator
    fields = {"max_position_embeddings": seq_len, "bos_token_id": end, "eos_token_id": end}
    file = run / run_dir.TOKENIZER / tokenizers.FILE
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:  # bytes have no file
        text = None
    except OSError as error:
        raise UserError(f"{str(file)!r}: cannot be read ({error.strerror})") from None
    return fields, tokenizer_files(tokenizer, text, seq_len)
