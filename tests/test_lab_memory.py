"""The lab on memory: what its students draw."""

import re

from lab_runs import LABS

from llmlab.checkpoint import transformers_config
from llmlab.grading.checks import student_rng

LAB = LABS["memory"]
SCORES = {  # of 19 points, for the example class
    "student-01": 19, "student-02": 0, "student-03": 11, "student-04": 2.25, "student-05": 16, "student-06": 16,
    "student-07": 19, "student-08": 19, "student-09": 19, "student-10": 17, "student-11": 19,
}  # fmt: skip


def test_every_students_drawn_model_can_be_built(root):
    """The prediction's model of a few hundred ids: transformers takes the shape, and its parameters are the formula's."""
    given = next(c.source for c in LAB.cells if c.metadata.get("nbgrader", {}).get("grade_id") == "given")
    namespace = {}
    exec(re.sub(r"^withhold\(.*\)$", "", given, flags=re.MULTILINE), namespace)
    for number in range(300):
        config = namespace["draw_decoder"](student_rng(f"student-{number:02d}", "memory"))
        assert config.num_heads * config.head_size != config.hidden_size
        assert transformers_config(config).num_key_value_heads == config.num_kv_heads
