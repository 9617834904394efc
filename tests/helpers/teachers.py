"""Outputs of teachers that are named by text, with all settings as keywords."""

from functools import partial

import compression
from compression.engine import run
from compression.training import teacher as _teacher
from compression.training.settings import OutputSettings


def teacher_outputs(cache, teacher, ids, *, mask=None, progress=None, recipe="fp16", **settings):
    source = compression.locate(str(teacher)).fetch()
    opened = partial(run.open_teacher, source, recipe)
    return _teacher.teacher_outputs(
        cache, _teacher.Teacher(source=source, open=opened, recipe=recipe), ids, mask=mask, progress=progress,
        settings=OutputSettings(**settings),
    )  # fmt: skip
