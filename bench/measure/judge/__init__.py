"""Judging answers: by a judge model (G-Eval, prompt alignment), and by measures that need none (clarity).

A question goes with its paragraph to the model under test (`answers`), its answer to a judge (`asking.Judge`): an
OpenAI-compatible endpoint (`remote`, over `endpoint` and `cache`) or a local model (`local`). `g_eval`, `alignment` and
`bias` say what the judge is asked, `clarity` and `likelihood` ask nobody.
"""
