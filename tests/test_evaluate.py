"""What the command line of `python -m vlm_jax.evaluate` means; a whole run is in `training/evaluators/test_samples.py`."""

import pytest

from tests.tiny import tiny_run
from vlm_jax.config import GenerationConfig, RankingConfig, StampsConfig
from vlm_jax.errors import RequestError
from vlm_jax.evaluate import _config

RUN = tiny_run(evaluators=(RankingConfig(name="captions", captions=5),))


def test_names_kinds_and_settings():
    found = _config(RUN, ["captions:rows=8", "generation:metric=cider,beams=3"], "").evaluators
    assert found == (RankingConfig(name="captions", captions=5, rows=8), GenerationConfig(metric="cider", beams=3))
    assert _config(RUN, [], "").evaluators == RUN.evaluators
    assert _config(RUN, [], "stamps:folder=/stamps").data.source == StampsConfig(folder="/stamps")


@pytest.mark.parametrize(
    "evaluators, message",
    [
        (["rankings"], "kind 'rankings' is not known: expected one of .*'ranking'"),
        (["ranking:row=8"], "row"),
        (["ranking:rows=many"], "rows"),
        (["ranking:rows"], "'rows': expected SETTING=VALUE"),
        (["ranking", "ranking:blank=True"], "two evaluators are called 'ranking': give one another name, ranking:name=other"),
    ],
)
def test_what_is_wrong_is_named(evaluators, message):
    with pytest.raises(ValueError, match=message):
        _config(RUN, evaluators, "")


def test_a_run_without_evaluators_asks_for_one():
    with pytest.raises(RequestError, match="name one, --evaluator=generation"):
        _config(tiny_run(), [], "")
