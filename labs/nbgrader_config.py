"""nbgrader's settings for this course; plain ``nbgrader`` commands in this folder read them.

Instructors' notebooks are generated into ``build/source`` from the ``.py`` files beside this one (``llmlab labs build``).
"""

import os
from pathlib import Path

from llmlab.grading.nbgrader_plugin import MendStructure, RecordScores, ResumingExporter, SeededExecute
from nbconvert.preprocessors import ClearMetadataPreprocessor, CSSHTMLHeaderPreprocessor
from nbgrader.preprocessors import (
    AssignLatePenalties,
    CheckCellMetadata,
    ClearHiddenTests,
    ClearOutput,
    DeduplicateIds,
    GetGrades,
    IgnorePattern,
    LimitOutput,
    OverwriteCells,
    OverwriteKernelspec,
    SaveAutoGrades,
)

c = get_config()

root = Path(os.environ.get("LLMLAB_COURSE_ROOT") or Path(__file__).parent).resolve()
c.CourseDirectory.course_id = "llmlab"
c.CourseDirectory.root = str(root)
c.CourseDirectory.source_directory = "build/source"
c.CourseDirectory.release_directory = "build/release"

# A run that was killed must not pass for a finished one.
c.Autograde.exporter_class = ResumingExporter

# A copied cell must not end the class's run, a deleted test cell comes back.
c.Autograde.sanitize_preprocessors = [
    ClearOutput, MendStructure, DeduplicateIds, OverwriteKernelspec, OverwriteCells, CheckCellMetadata,
]  # fmt: skip

# Scores come from the record that the checks leave, not from what happens to stand in the outputs.
c.Autograde.autograde_preprocessors = [
    SeededExecute, RecordScores, IgnorePattern, ClearMetadataPreprocessor, LimitOutput, SaveAutoGrades,
    AssignLatePenalties, CheckCellMetadata,
]  # fmt: skip
c.ClearMetadataPreprocessor.preserve_nb_metadata_mask = {"kernelspec", "language_info", "llmlab"}
c.ClearMetadataPreprocessor.preserve_cell_metadata_mask = {"nbgrader"}
c.Execute.timeout = int(os.environ.get("LLMLAB_CELL_SECONDS", "60"))  # of each cell; a test cell has more, by its properties

# The feedback shows outcomes, not the hidden tests.
c.GenerateFeedback.preprocessors = [GetGrades, ClearHiddenTests, CSSHTMLHeaderPreprocessor]

# A submission that was never graded has no score; nbgrader's own export gives it 0.0.
c.ExportApp.plugin_class = "llmlab.grading.export.CheckedCsvExport"
