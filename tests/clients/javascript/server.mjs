// The server of the tests, and what they all ask it.

import { z } from "zod";

export const url = process.env.SAGELLM_URL;
export const apiKey = process.env.SAGELLM_KEY;
export const model = "sage-tiny";
export const City = z.object({ city: z.enum(["Paris", "Rome"]) });
export const question = "What is 23 + 45?";
export const asked = "What is the weather in Paris?";

export function user(content) {
  return [{ role: "user", content }];
}
