"""Let a model call a Python function: in this process, or on a server whose URL is given."""

import sys

from weather_tools import get_weather

from sagellm import UnifiedInferenceClient

QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]


def main(url: str | None) -> None:
    with UnifiedInferenceClient.create(url, embedded=url is None) as client:
        # One call of the model: it asks for a tool, and nothing runs yet.
        reply = client.chat(QUESTION, tools=[get_weather], temperature=0)
        for call in reply.tool_calls:
            print(f"the model asks for {call.name} {call.arguments}")

        # The whole loop: the function runs, and the model answers with its result.
        run = client.run_tools(QUESTION, tools=[get_weather], temperature=0)
        for message in run.messages:
            print(message["role"], message["content"] or message["tool_calls"])
        print(run.text)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
