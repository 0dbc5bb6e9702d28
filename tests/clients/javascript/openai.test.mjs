// The openai package: chats and responses, with its helpers for tools and zod.

import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import {
  zodFunction,
  zodResponseFormat,
  zodResponsesFunction,
  zodTextFormat,
} from "openai/helpers/zod";
import { apiKey, asked, City, model, question, url, user } from "./server.mjs";

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const fields = { model, messages: user(asked), temperature: 0, max_tokens: 256 };
const tool = zodFunction({ name: "get_weather", parameters: City });
const input = { model, input: asked, temperature: 0, max_output_tokens: 256 };
const responseTool = zodResponsesFunction({ name: "get_weather", parameters: City });

test("a chat is answered and streamed", async () => {
  const said = { ...fields, messages: user(question) };
  const whole = await client.chat.completions.create(said);
  const stream = client.chat.completions.stream(said);
  let text = "";
  stream.on("content", (piece) => (text += piece));
  const final = await stream.finalChatCompletion();
  assert.equal(whole.choices[0].message.content.trim(), "68");
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(final.choices[0].finish_reason, "stop");
});

test("a chat calls a tool that zod parses", async () => {
  const whole = await client.chat.completions.parse({ ...fields, tools: [tool] });
  const [call] = whole.choices[0].message.tool_calls;
  assert.deepEqual(call.function.parsed_arguments, { city: "Paris" });
  const stream = client.chat.completions.stream({ ...fields, tools: [tool], tool_choice: "required" });
  const final = await stream.finalChatCompletion();
  assert.equal(final.choices[0].finish_reason, "tool_calls");
  assert.ok(City.parse(final.choices[0].message.tool_calls[0].function.parsed_arguments));
});

for (const stream of [false, true]) {
  test(`tools run until the answer is text, ${stream ? "streamed" : "whole"}`, async () => {
    const ran = [];
    const runnable = zodFunction({
      name: "get_weather",
      parameters: City,
      function: ({ city }) => (ran.push(city), { weather: "rain" }),
    });
    const runner = client.chat.completions.runTools({ ...fields, tools: [runnable], stream });
    assert.match(await runner.finalContent(), /rain/);
    assert.deepEqual(ran, ["Paris"]);
    assert.deepEqual(runner.messages.map((message) => message.role), ["user", "assistant", "tool", "assistant"]);
  });
}

test("an answer has the form of a schema, also beside a tool", async () => {
  const response_format = zodResponseFormat(City, "place");
  const alone = await client.chat.completions.parse({ ...fields, response_format });
  assert.ok(City.parse(alone.choices[0].message.parsed));
  const both = await client.chat.completions.parse({ ...fields, response_format, tools: [tool] });
  const { parsed, tool_calls } = both.choices[0].message;
  assert.ok(parsed ?? tool_calls[0].function.parsed_arguments);
});

test("a response is made and streamed", async () => {
  const whole = await client.responses.create({ ...input, input: question });
  const stream = client.responses.stream({ ...input, input: question });
  const kinds = [];
  for await (const event of stream) kinds.push(event.type);
  assert.equal(whole.output_text.trim(), "68");
  assert.equal((await stream.finalResponse()).output_text, whole.output_text);
  assert.deepEqual([kinds[0], kinds.at(-1)], ["response.created", "response.completed"]);
});

test("a response calls a tool and has the form of a schema", async () => {
  const first = await client.responses.parse({ ...input, tools: [responseTool] });
  const call = first.output.find((item) => item.type === "function_call");
  assert.deepEqual(call.parsed_arguments, { city: "Paris" });
  const output = { type: "function_call_output", call_id: call.call_id, output: "rain" };
  const items = [...user(asked), ...first.output, output];
  const last = await client.responses.create({ ...input, input: items, tools: [responseTool] });
  assert.match(last.output_text, /rain/);
  const format = zodTextFormat(City, "place");
  assert.ok(City.parse((await client.responses.parse({ ...input, text: { format } })).output_parsed));
});

test("what the client parsed goes round", async () => {
  const called = await client.chat.completions.parse({ ...fields, tools: [tool] });
  const response_format = zodResponseFormat(City, "place");
  const told = await client.chat.completions.parse({ ...fields, response_format });
  const [first, second] = [called, told].map((answer) => answer.choices[0].message);
  const result = { role: "tool", tool_call_id: first.tool_calls[0].id, content: "rain" };
  const messages = [...user(asked), second, ...user(asked), first, result];
  const last = await client.chat.completions.create({ ...fields, messages, tools: [tool] });
  assert.match(last.choices[0].message.content, /rain/);
});

test("what is wrong is a bad request that names the field", async () => {
  const wrong = client.chat.completions.create({ ...fields, temperature: -1 });
  await assert.rejects(wrong, (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature");
});
