"""Fit figures to Azure's two traces of 2023: quantiles of the lengths, means, rate. The traces themselves stay outside.

    python benchmarks/fit_traces.py --traces FOLDER

FOLDER holds AzureLLMInferenceTrace_conv.csv and AzureLLMInferenceTrace_code.csv, from the repository
Azure/AzurePublicDataset (CC-BY 4.0). Writes llmlab/data/workloads/azure-2023.json.
"""

import argparse
import json
import re
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from llmlab.batching.metrics import percentile
from llmlab.batching.workload import AZURE_FILE, read_trace

FILES = {"conversation": "AzureLLMInferenceTrace_conv.csv", "code": "AzureLLMInferenceTrace_code.csv"}
# Close together where the outputs' long tail bends: straight lines between these keep every mean within 1.1 %.
PERCENTS = [0, 1, 2, *range(5, 90, 5), *range(90, 100), 99.2, 99.5, 99.7, 99.8, 99.9, 99.95, 100]
SOURCE = {
    "citation": "Patel et al., Splitwise: Efficient Generative LLM Inference Using Phase Splitting, ISCA 2024",
    "traces": "https://github.com/Azure/AzurePublicDataset, AzureLLMInferenceDataset2023",
    "licence": "CC-BY 4.0",
    "changes": "Figures fitted to the traces by benchmarks/fit_traces.py; no row of a trace is kept.",
}


def ranks(values: list[int]) -> list[float]:
    """The place of each value in order, counted from 1; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    places = [0.0] * len(values)
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or values[order[end]] != values[order[start]]:
            for index in order[start:end]:
                places[index] = (start + 1 + end) / 2
            start = end
    return places


def fit(path: Path) -> dict[str, Any]:
    """The figures of one trace."""
    rows = read_trace(path)
    prompts, outputs = [row.prompt for row in rows], [row.output for row in rows]
    gaps = [after.arrival - before.arrival for before, after in pairwise(rows)]
    return {
        "requests": len(rows),
        "seconds": round(rows[-1].arrival, 3),
        "requests_per_second": round(1 / statistics.fmean(gaps), 5),
        "gap_cv": round(statistics.pstdev(gaps) / statistics.fmean(gaps), 4),
        "rank_correlation": round(statistics.correlation(ranks(prompts), ranks(outputs)), 4),
        "prompt_mean": round(statistics.fmean(prompts), 3),
        "output_mean": round(statistics.fmean(outputs), 3),
        "percents": PERCENTS,
        "prompt_quantiles": [round(percentile(prompts, q), 2) for q in PERCENTS],
        "output_quantiles": [round(percentile(outputs, q), 2) for q in PERCENTS],
    }


def write(traces: Path, file: Path) -> None:
    """Fit both traces of a folder and write the figures to ``file``, with their source."""
    services = {service: fit(traces / name) for service, name in FILES.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"source": SOURCE, "services": services}, indent=1)
    one_line = re.sub(r"\[[^][]*\]", lambda numbers: " ".join(numbers[0].split()), text)
    file.write_text(one_line + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, metavar="FOLDER")
    write(parser.parse_args().traces, AZURE_FILE)
    print(f"wrote {AZURE_FILE}")


if __name__ == "__main__":
    main()
