"""Which SAE a command line names: a folder, one that ships with graphlens, or one on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from graphlens.cli.options import flag
from graphlens.errors import InputError
from graphlens.file.embedded import SAES
from graphlens.file.folder import user_path

if TYPE_CHECKING:
    from graphlens.edits.sae import Sae
    from graphlens.edits.spliced_sae import SplicedSae

Saes = Annotated[
    list[str] | None,
    typer.Option(
        "--sae",
        metavar="SAE",
        help="An SAE to put into the model: its folder, tiny-gpt2-saes/ITS_HOOK, or OWNER/NAME/FOLDER on the hub; several times "
        "for several.",
    ),
]
ErrorTerm = Annotated[bool, flag("--error-term", help="Add what the SAEs do not reconstruct to what they write.")]


def spliced(names: Sequence[str] | None, error_term: bool) -> list[SplicedSae]:
    """The SAEs that a user names, as they are put into a model.

    Args:
        names: Names; see ``sae_of``. None for no SAE.
        error_term: True adds what they do not reconstruct.

    Raises:
        InputError: See ``sae_of``.
        ModelFileError: See there.
    """
    if not names:
        return []
    from graphlens.edits.spliced_sae import SplicedSae

    return [SplicedSae.of(sae_of(name), error_term) for name in names]


def sae_of(name: str, hook: str | None = None) -> Sae:
    """The SAE that a user names.

    Args:
        name: A folder, "tiny-gpt2-saes/blocks.0.hook_mlp_out", or "owner/name/folder" of the hub. A folder wins.
        hook: The hook point that it reads, where its files do not say.

    Raises:
        InputError: It is none of these.
        ModelFileError: There is no SAE, or it cannot be read.
    """
    from graphlens.edits.sae import Sae

    if user_path(name).is_dir():
        return Sae.from_folder(name, hook)
    parts = name.split("/")
    of_release = 1 if parts[0] in SAES else 2
    release, sae_id = "/".join(parts[:of_release]), "/".join(parts[of_release:])
    if not release or not sae_id or name.startswith((".", "/", "~")):
        raise InputError(
            f"--sae {name:.200}: there is no such folder. Others are tiny-gpt2-saes/blocks.0.hook_mlp_out, or OWNER/NAME/FOLDER."
        )
    return Sae.from_pretrained(release, sae_id, hook)
