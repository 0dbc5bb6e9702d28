"""A file of prompts to a file of answers, as `sagellm run --input ... --output ...` does it."""

import json
import tempfile
from pathlib import Path

from sagellm.cli import main

PROMPTS = [
    {"id": "sum", "messages": [{"role": "user", "content": "What is 12 + 30?"}], "max_tokens": 8},
    {"id": "code", "prompt": "import ", "max_tokens": 8},
    {
        "custom_id": "batch",
        "body": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
    },
]

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "prompts.jsonl"), Path(folder, "answers.jsonl")
        asked.write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
        code = main(["run", "graphs/pd.yaml", "--input", str(asked), "--output", str(answered)])
        print(answered.read_text(), end="")
    raise SystemExit(code)
