// The page of docs/drivable.md in headless Chromium: a drivable file in onnxruntime-web, all from this machine.
import assert from "node:assert/strict";
import { mkdirSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, relative } from "node:path";
import { test } from "node:test";

import { chromium } from "playwright-core";

import { assertSameRuns, example, here, made } from "./expected.js";

const types = { ".html": "text/html", ".mjs": "text/javascript", ".wasm": "application/wasm", ".json": "application/json" };

/** Serves the example as "/", node_modules, and the files that make_files.py wrote. */
async function answer(request, response) {
  const { pathname } = new URL(request.url, "http://localhost"); // resolves what dots there are
  try {
    const root = pathname.startsWith("/node_modules/") ? here : made;
    const body = pathname === "/" ? example("html") : await readFile(`${root}${pathname}`);
    const type = types[pathname === "/" ? ".html" : extname(pathname)] ?? "application/octet-stream";
    response.writeHead(200, { "Content-Type": type }).end(body);
  } catch {
    response.writeHead(404).end();
  }
}

test("the browser example of docs/drivable.md shows Python's figures", { timeout: 120_000 }, async (t) => {
  const server = createServer(answer);
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.after(() => server.close());
  const origin = `http://127.0.0.1:${server.address().port}`;
  const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    args: [
      ...["--no-sandbox", "--disable-gpu", "--no-first-run"],
      ...["--disable-background-networking", "--disable-component-update", "--disable-sync"],
    ],
  });
  t.after(() => browser.close());
  const page = await browser.newPage({ viewport: { width: 720, height: 360 } });
  const [errors, elsewhere] = [[], []];
  page.on("pageerror", (error) => errors.push(error.message));
  page.on("request", (request) => request.url().startsWith(origin) || elsewhere.push(request.url()));

  await page.goto(origin);
  const done = () => document.querySelectorAll("tbody tr").length === 2;
  await page.waitForFunction(done, null, { timeout: 60_000 }).catch((error) => errors.push(error.message));
  mkdirSync(`${here}artifacts`, { recursive: true });
  const picture = `${here}artifacts/browser.png`;
  await page.screenshot({ path: picture });
  t.diagnostic(`screenshot: ${relative(`${here}../..`, picture)}`);

  assert.deepEqual(errors, []);
  assert.deepEqual(elsewhere, [], "asked of another machine");
  const rows = await page.locator("tbody tr").evaluateAll((all) =>
    all.map((row) => [...row.cells].map((cell) => cell.textContent)),
  );
  const found = rows.map(([run, top, difference]) => [run, { top: JSON.parse(top), difference: Number(difference) }]);
  assertSameRuns(t, Object.fromEntries(found));
});
