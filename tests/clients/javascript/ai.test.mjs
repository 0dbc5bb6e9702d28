// The AI SDK with each of its providers that has an API of the server.

import assert from "node:assert/strict";
import { test } from "node:test";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, Output, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";
import { apiKey, asked, City, model, question, url } from "./server.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false; // of settings that the API of a provider lacks
const baseURL = `${url}/v1`;
const openai = createOpenAI({ baseURL, apiKey });
const compatible = { name: "sagellm", baseURL, apiKey, includeUsage: true };
const providers = {
  "openai-compatible": createOpenAICompatible({ ...compatible, supportsStructuredOutputs: true })(model),
  "openai responses": openai(model),
  "openai chat": openai.chat(model),
  anthropic: createAnthropic({ baseURL, apiKey })(model),
};
const getWeather = tool({
  description: "The weather of a city.",
  inputSchema: City,
  execute: async ({ city }) => ({ city, weather: "rain" }),
});
const Report = z.object({ city: z.enum(["Paris", "Rome"]), isDry: z.boolean().nullable() });

function failing({ error }) {
  throw error;
}

test("openai responses: a conversation goes on, at the defaults of the provider", async () => {
  const fields = { model: openai(model), temperature: 0, maxOutputTokens: 256, maxRetries: 0 };
  const messages = [{ role: "user", content: asked }];
  const tools = { get_weather: getWeather };
  const first = await generateText({ ...fields, messages, tools, stopWhen: stepCountIs(4) });
  messages.push(...first.response.messages, { role: "user", content: question });
  const second = streamText({ ...fields, messages, tools, onError: failing });
  const { body } = await second.request;
  assert.ok(body.input.some((item) => item.type === "item_reference"));
  assert.match(await second.text, /68/);
  messages.push(...(await second.response).messages, { role: "user", content: question });
  assert.match((await generateText({ ...fields, messages, tools })).text, /68/);
});

for (const [name, provided] of Object.entries(providers)) {
  const fields = { model: provided, prompt: asked, temperature: 0, maxOutputTokens: 256, maxRetries: 0 };
  const tools = { get_weather: getWeather };

  test(`${name}: text, whole and streamed`, async () => {
    const whole = await generateText({ ...fields, prompt: question });
    const stream = streamText({ ...fields, prompt: question, onError: failing });
    let text = "";
    for await (const piece of stream.textStream) text += piece;
    assert.equal(whole.text.trim(), "68");
    assert.equal(text, whole.text);
    assert.ok((await stream.usage).outputTokens > 0);
  });

  test(`${name}: tools run until the answer is text`, async () => {
    const whole = await generateText({ ...fields, tools, stopWhen: stepCountIs(4) });
    assert.match(whole.text, /rain/);
    assert.deepEqual(whole.steps.map((step) => step.finishReason), ["tool-calls", "stop"]);
    assert.deepEqual(whole.steps[0].toolCalls[0].input, { city: "Paris" });
  });

  test(`${name}: tools run in a stream`, async () => {
    const stream = streamText({ ...fields, tools, stopWhen: stepCountIs(4), onError: failing });
    const kinds = new Set();
    for await (const part of stream.fullStream) kinds.add(part.type);
    for (const kind of ["tool-input-delta", "tool-call", "tool-result", "text-delta", "finish"]) {
      assert.ok(kinds.has(kind), kind);
    }
    assert.match(await stream.text, /rain/);
  });

  for (const toolChoice of ["required", { type: "tool", toolName: "get_weather" }]) {
    test(`${name}: a tool that must be called, ${toolChoice.type ?? toolChoice}`, async () => {
      const { toolCalls } = await generateText({ ...fields, tools, toolChoice });
      for (const call of toolCalls) assert.ok(City.parse(call.input));
      assert.ok(toolCalls.length);
    });
  }

  test(`${name}: an object, whole and streamed`, async () => {
    const { object } = await generateObject({ ...fields, schema: Report });
    const stream = streamObject({ ...fields, schema: Report, onError: failing });
    let last;
    for await (const partial of stream.partialObjectStream) last = partial;
    assert.ok(Report.parse(object));
    assert.deepEqual(last, object);
    assert.deepEqual(await stream.object, object);
  });

  test(`${name}: a choice, and a list`, async () => {
    const choice = await generateText({ ...fields, output: Output.choice({ options: ["dry", "wet"] }) });
    assert.ok(["dry", "wet"].includes(choice.output));
    const element = z.enum(["dry", "wet"]);
    const { elements } = await generateText({
      ...fields,
      output: Output.object({ schema: z.object({ elements: z.array(element).max(2) }) }),
    }).then((answer) => answer.output);
    assert.ok(elements.length <= 2);
  });

  test(`${name}: a form beside tools`, async () => {
    // One turn: sage-tiny may call on and on, because the form admits none of its sentences.
    const output = Output.object({ schema: Report });
    const answer = await generateText({ ...fields, tools, output });
    assert.ok(answer.toolCalls.length || Report.parse(answer.output));
  });

  test(`${name}: what is wrong is no call to repeat`, async () => {
    const wrong = generateText({ ...fields, prompt: "x".repeat(99_999), maxOutputTokens: 8 });
    await assert.rejects(wrong, (error) => error.statusCode === 400 && !error.isRetryable);
  });
}
