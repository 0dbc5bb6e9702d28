"""One client, of a graph in this process or of a server: `client.py http://127.0.0.1:8000`."""

import sys

from sagellm import ClientError, UnifiedInferenceClient

QUESTION = [{"role": "user", "content": "What is 23 + 45?"}]


def main(url: str | None) -> None:
    with UnifiedInferenceClient.create(url, embedded=url is None) as client:
        answer = client.chat(QUESTION, temperature=0)
        print(answer, answer.finish_reason, answer.usage)
        with client.generate("def double(", max_tokens=16, temperature=0, stream=True) as stream:
            for piece in stream:
                print(piece, end="", flush=True)
        print()
        try:
            client.chat(QUESTION, max_tokens=0)
        except ClientError as error:
            print(error.status, error)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
