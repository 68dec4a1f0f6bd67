// What Python computed (make_files.py), and how results are compared with it.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

export const here = fileURLToPath(new URL(".", import.meta.url));
export const made = `${here}made`;
export const expected = JSON.parse(readFileSync(`${made}/expected.json`, "utf8"));

/** Asserts that two logits differ by at most 1e-5 times the larger of 1 and the largest reference. */
export function assertClose(t, values, reference) {
  assert.equal(values.length, reference.length);
  assert.ok(values.every(Number.isFinite));
  const largest = reference.reduce((most, number) => Math.max(most, Math.abs(number)), 1);
  const worst = reference.reduce((most, number, i) => Math.max(most, Math.abs(values[i] - number)), 0);
  t.diagnostic(`largest difference ${worst.toExponential(2)}, largest logit ${largest.toFixed(1)}`);
  assert.ok(worst <= 1e-5 * largest, `${worst} > 1e-5 x ${largest}`);
}

/** Asserts that a run shows Python's top tokens and, within 1e-4, Python's logit differences. */
export function assertSameRuns(t, found) {
  for (const [run, { top, difference }] of Object.entries(expected.runs)) {
    assert.equal(found[run].top, top);
    const error = Math.abs(found[run].difference - difference);
    t.diagnostic(`${run}: top '${top}', logit difference ${found[run].difference}, off by ${error.toExponential(2)}`);
    assert.ok(error <= 1e-4, `${run}: ${found[run].difference}, and ${difference} in Python`);
  }
}

/** The n-th fenced block of a language in docs/drivable.md. */
export function example(language, n = 0) {
  const page = readFileSync(`${here}../../docs/drivable.md`, "utf8");
  const blocks = [...page.matchAll(new RegExp(`^\`\`\`${language}\n(.*?)^\`\`\``, "gms"))];
  return blocks[n][1];
}
