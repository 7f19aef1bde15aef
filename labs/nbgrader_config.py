"""nbgrader's settings for this course; plain ``nbgrader`` commands in this folder read them.

Instructors' notebooks are generated into ``build/source`` from the ``.py`` files beside this one (``llmlab labs build``).
"""

import os
from pathlib import Path

from llmlab.grading.late import PerDay
from llmlab.grading.nbgrader_plugin import BeginGrading, GradingExporter, SplitExecute, use_split_validation
from nbconvert.preprocessors import CSSHTMLHeaderPreprocessor
from nbgrader.preprocessors import AssignLatePenalties, CheckCellMetadata, ClearHiddenTests, GetGrades, SaveAutoGrades

c = get_config()

root = Path(os.environ.get("LLMLAB_COURSE_ROOT") or Path(__file__).parent).resolve()
c.CourseDirectory.course_id = "llmlab"
c.CourseDirectory.root = str(root)
c.CourseDirectory.source_directory = "build/source"
c.CourseDirectory.release_directory = "build/release"

# Submissions run in a sandbox, the tests outside it; scores come from the tests and from nowhere else.
c.Autograde.exporter_class = GradingExporter
c.Autograde.sanitize_preprocessors = [BeginGrading]
c.Autograde.autograde_preprocessors = [SplitExecute, SaveAutoGrades, AssignLatePenalties, CheckCellMetadata]
use_split_validation()

# The feedback shows outcomes, not the hidden tests.
c.GenerateFeedback.preprocessors = [GetGrades, ClearHiddenTests, CSSHTMLHeaderPreprocessor]

# Lateness costs nothing unless you say what: a share of the score for each day begun after the grace.
c.AssignLatePenalties.plugin_class = PerDay
# c.PerDay.percent_per_day = 10
# c.PerDay.grace_minutes = 15
# c.PerDay.most_percent = 50

# A submission that was never graded has no score; nbgrader's own export gives it 0.0.
c.ExportApp.plugin_class = "llmlab.grading.export.CheckedCsvExport"
