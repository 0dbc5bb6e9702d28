"""Read a person out of a text: in this process, or on a server whose URL is given."""

import sys

import msgspec

from sagellm import UnifiedInferenceClient

TEXT = "Ada is 31 years old and lives in Rome. Answer as JSON with name, age and city."


class Person(msgspec.Struct):
    """A dataclass, a TypedDict or a pydantic model will do, too."""

    name: str
    age: int
    city: str


def main(url: str | None) -> None:
    messages = [{"role": "user", "content": TEXT}]
    with UnifiedInferenceClient.create(url, embedded=url is None) as client:
        person = client.chat(messages, response_format=Person, temperature=0).parsed
        print(f"{person.name} will be {person.age + 1} in {person.city}")

        with client.chat(messages, response_format=Person, temperature=0, stream=True) as stream:
            for piece in stream:  # the text of the JSON, as it comes
                print(piece, end="", flush=True)
        print("\n", stream.parsed, sep="")

        question = [{"role": "user", "content": "Is 23 + 45 more than 60?"}]
        print(client.chat(question, choices=["yes", "no"], temperature=0))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
