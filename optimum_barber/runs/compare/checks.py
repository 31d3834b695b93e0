"""What can be said of the files of a comparison before its model is loaded."""

from ...base.errors import BarberError
from ...prune.settings import BarberConfig
from ...text.sources import TEXTS
from ..recipe.validation import known_text
from .cells import CompareError
from .settings import CompareSettings


def check_files(settings: CompareSettings, base: BarberConfig) -> None:
    """Texts and tasks that are there.

    Raises:
        CompareError: every one that is not.
    """
    faults = [
        f"text {text!r} is neither a file nor one of {', '.join(TEXTS)}"
        for text in [*base.calibration.texts, settings.evaluation]
        if not known_text(text)
    ]
    if settings.tasks:
        from optimum_barber.integrations.lm_eval.run import check_tasks

        try:
            check_tasks(settings.tasks)
        except BarberError as error:
            faults.append(str(error))
    if faults:
        raise CompareError(faults)
