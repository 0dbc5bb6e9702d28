// The @anthropic-ai/sdk package: messages, with its helpers for tools and zod.

import assert from "node:assert/strict";
import { test } from "node:test";
import Anthropic from "@anthropic-ai/sdk";
import { betaZodTool } from "@anthropic-ai/sdk/helpers/beta/zod";
import { zodOutputFormat } from "@anthropic-ai/sdk/helpers/zod";
import { z } from "zod";
import { apiKey, asked, City, model, question, url, user } from "./server.mjs";

const client = new Anthropic({ baseURL: url, apiKey, maxRetries: 0 });
const fields = { model, messages: user(asked), max_tokens: 256, temperature: 0 };
const tool = { name: "get_weather", input_schema: z.toJSONSchema(City) };

test("a message is made and streamed", async () => {
  const said = { ...fields, messages: user(question) };
  const whole = await client.messages.create(said);
  const stream = client.messages.stream(said);
  let text = "";
  stream.on("text", (piece) => (text += piece));
  const final = await stream.finalMessage();
  assert.equal(whole.content[0].text.trim(), "68");
  assert.equal(text, whole.content[0].text);
  assert.equal(final.stop_reason, "end_turn");
});

test("a tool is called, and its result read", async () => {
  const whole = await client.messages.create({ ...fields, tools: [tool] });
  const [use] = whole.content;
  assert.deepEqual(use.input, { city: "Paris" });
  const streamed = await client.messages.stream({ ...fields, tools: [tool] }).finalMessage();
  assert.deepEqual(streamed.content[0].input, use.input);
  const result = { type: "tool_result", tool_use_id: use.id, content: "rain" };
  const turns = [...user(asked), { role: "assistant", content: whole.content }, ...user([result])];
  const last = await client.messages.create({ ...fields, messages: turns, tools: [tool] });
  assert.match(last.content[0].text, /rain/);
});

test("tools run until the answer is text", async () => {
  const ran = [];
  const runnable = betaZodTool({
    name: "get_weather",
    description: "The weather of a city.",
    inputSchema: City,
    run: ({ city }) => (ran.push(city), "rain"),
  });
  const last = await client.beta.messages.toolRunner({ ...fields, tools: [runnable], max_iterations: 3 });
  assert.match(last.content[0].text, /rain/);
  assert.deepEqual(ran, ["Paris"]);
});

test("an answer has the form of a schema", async () => {
  const output_config = { format: zodOutputFormat(City) };
  const answer = await client.messages.parse({ ...fields, output_config });
  assert.ok(City.parse(answer.parsed_output));
});

test("tokens are counted, and what is wrong is a bad request", async () => {
  const { max_tokens, temperature, ...said } = fields;
  assert.ok((await client.messages.countTokens({ ...said, tools: [tool] })).input_tokens > 0);
  const wrong = client.messages.create({ ...fields, temperature: -1 });
  await assert.rejects(wrong, (error) => error instanceof Anthropic.BadRequestError && /temperature/.test(error.message));
});
