#!/usr/bin/env node
// Draws docs/grafana-dashboard.json with what a Prometheus knows, as a PNG: for the docs, and to look
// at a changed dashboard without a Grafana. Grafana's components come from npm (package.json; 430 MB
// in build/dashboard), the picture is taken by chromium. Needs node 20 and npm, and Debian's chromium,
// fonts-inter (Grafana's font) and pngquant.

import { execFileSync } from 'node:child_process';
import { copyFileSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { parseArgs } from 'node:util';

const here = dirname(fileURLToPath(import.meta.url));
const top = join(here, '../..');

const usage = `usage: draw.mjs [--prometheus URL] [--from TIME] [--to TIME] [--scrape SECONDS] [--width PIXELS]
       [--dashboard FILE] [--out FILE]

  --prometheus URL   the Prometheus to ask (default http://127.0.0.1:9090)
  --from, --to TIME  seconds since 1970, or a date and time (default the last hour)
  --scrape SECONDS   scrape interval, as told to Grafana's data source (default 15)
  --width PIXELS     of the picture (default 1600)
  --dashboard FILE   (default docs/grafana-dashboard.json)
  --out FILE         (default docs/dashboard.png)`;

const { values: options } = parseArgs({ options: {
  prometheus: { type: 'string', default: 'http://127.0.0.1:9090' },
  from: { type: 'string', default: String(Date.now() / 1000 - 3600) },
  to: { type: 'string', default: String(Date.now() / 1000) },
  scrape: { type: 'string', default: '15' },
  width: { type: 'string', default: '1600' },
  dashboard: { type: 'string', default: join(top, 'docs/grafana-dashboard.json') },
  out: { type: 'string', default: join(top, 'docs/dashboard.png') },
  help: { type: 'boolean', short: 'h' },
} });
if (options.help) {
  console.log(usage);
  process.exit();
}

const seconds = (time) => (/^[\d.]+$/.test(time) ? Number(time) : Date.parse(time) / 1000);
const [scrape, width] = [Number(options.scrape), Number(options.width)];
const ends = [options.from, options.to].map(seconds);
// As Grafana does: no more points than pixels, at multiples of the step; rates are those of four scrapes at least.
const step = scrape * Math.max(1, Math.ceil((ends[1] - ends[0]) / width / scrape));
const [from, to] = ends.map((time) => Math.floor(time / step) * step);
const variables = { instance: '.*', export: '.*', __rate_interval: `${Math.max(step + scrape, 4 * scrape)}s`, __range: `${to - from}s` };

// query answers a query of a panel with the series that its legend names.
async function query({ expr, legendFormat }) {
  const asked = expr.replace(/\$(\w+)/g, (_, name) => variables[name]);
  const response = await fetch(`${options.prometheus}/api/v1/query_range`, {
    method: 'POST', body: new URLSearchParams({ query: asked, start: from, end: to, step }),
  });
  const answer = await response.json();
  if (answer.status !== 'success') {
    throw new Error(`${asked}: ${answer.error}`);
  }
  return answer.data.result.map(({ metric, values }) => ({
    name: legendFormat.replace(/\{\{ *(\w+) *\}\}/g, (_, label) => metric[label] ?? '').trim(),
    times: values.map(([time]) => time * 1000),
    values: values.map(([, value]) => (Number.isFinite(Number(value)) ? Number(value) : null)),
  }));
}

const dashboard = JSON.parse(readFileSync(options.dashboard));
const answers = {};
for (const panel of dashboard.panels) {
  answers[panel.id] = (await Promise.all((panel.targets ?? []).map(query))).flat();
}

const build = join(top, 'build/dashboard');
mkdirSync(build, { recursive: true });
copyFileSync(join(here, 'package.json'), join(build, 'package.json'));
execFileSync('npm', ['install', '--ignore-scripts', '--legacy-peer-deps', '--no-package-lock', '--no-audit', '--no-fund', '--loglevel=error'],
  { cwd: build, stdio: 'inherit' });
const esbuild = createRequire(join(build, 'package.json'))('esbuild');
esbuild.buildSync({
  entryPoints: [join(here, 'panels.jsx')], nodePaths: [join(build, 'node_modules')], outfile: join(build, 'panels.js'),
  bundle: true, logLevel: 'error', define: { 'process.env.NODE_ENV': '"production"', global: 'window' }, loader: { '.ttf': 'empty' },
});
const drawn = { dashboard, answers, step: step * 1000, from: from * 1000, to: to * 1000, timeZone: 'utc', width };
writeFileSync(join(build, 'dashboard.html'), `<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="panels.css"><body>
<script>window.drawn = ${JSON.stringify(drawn).replaceAll('<', '\\u003c')}</script><script src="panels.js"></script>`);

const rows = Math.max(...dashboard.panels.map(({ gridPos: { y, h } }) => y + h));
execFileSync('chromium', ['--headless', ...(process.getuid() === 0 ? ['--no-sandbox'] : []), '--disable-gpu', '--hide-scrollbars', `--window-size=${width},${40 + 38 * rows}`,
  '--virtual-time-budget=10000', `--screenshot=${join(build, 'dashboard.png')}`, pathToFileURL(join(build, 'dashboard.html')).href], { stdio: 'ignore' });
execFileSync('pngquant', ['--force', '--speed', '1', '--output', resolve(options.out), '128', join(build, 'dashboard.png')]);
