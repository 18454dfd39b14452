// The page that draw.mjs takes a picture of: the panels of a dashboard at their places. Time series
// and numbers are drawn by Grafana's own components (@grafana/ui); frame, rows and heat maps, which
// no package has, are done here in little.

import React from 'react';
import { createRoot } from 'react-dom/client';
import 'uplot/dist/uPlot.min.css';
import lodash from 'lodash';
import { scaleSequentialSqrt } from 'd3-scale';
import { interpolateOranges } from 'd3-scale-chromatic';
import {
  FieldType, createTheme, dateTime, dateTimeFormat, formattedValueToString, getDisplayProcessor,
  getDisplayValueAlignmentFactors, getFieldDisplayValues, getValueFormat, stringToJsRegex, toDataFrame, validateFieldConfig,
} from '@grafana/data';
import { AxisPlacement, ScaleDirection, ScaleOrientation, VizOrientation } from '@grafana/schema';
import { BigValue, GlobalStyles, PanelChrome, ThemeContext, TimeSeries, UPlotChart, UPlotConfigBuilder, VizRepeater } from '@grafana/ui';

const { dashboard, answers, step, from, to, timeZone, width } = window.drawn;
const theme = createTheme({ colors: { mode: 'dark' } });
const timeRange = { from: dateTime(from), to: dateTime(to), raw: { from: dateTime(from), to: dateTime(to) } };
const format = (unit, value) => formattedValueToString(getValueFormat(unit)(value));

// What a time series panel has where the dashboard says nothing.
const graph = {
  drawStyle: 'line', lineInterpolation: 'linear', lineWidth: 1, fillOpacity: 0, gradientMode: 'none', barAlignment: 0,
  axisPlacement: 'auto', axisGridShow: true, stacking: { mode: 'none', group: 'A' },
};

// place is where Grafana's grid has a panel: 24 columns, rows of 30 pixels, 8 between them.
const gap = 8;
function place({ x, y, w, h }) {
  const column = (width - gap) / 24;
  return { left: gap + x * column, top: y * (30 + gap), width: w * column - gap, height: h * (30 + gap) - gap };
}

// frames are the answers to a panel's queries, with its units, limits and colors, as its field
// configuration and the overrides of that tell.
function frames(panel) {
  const { defaults, overrides } = panel.fieldConfig;
  return answers[panel.id].map(({ name, times, values }, seriesIndex) => {
    const config = {
      ...structuredClone(defaults),
      color: { mode: panel.type === 'stat' ? 'thresholds' : 'palette-classic' },
      custom: { ...graph, ...defaults.custom },
      displayNameFromDS: name,
    };
    for (const { matcher, properties } of overrides.filter(({ matcher }) => stringToJsRegex(matcher.options).test(name))) {
      if (matcher.id !== 'byRegexp') {
        throw new Error(`${panel.title}: overrides of ${matcher.id} are not drawn`);
      }
      properties.forEach(({ id, value }) => lodash.set(config, id, value));
    }
    validateFieldConfig(config);
    const frame = toDataFrame({
      fields: [
        { name: 'Time', type: FieldType.time, config: { interval: step }, values: times },
        { name: 'Value', type: FieldType.number, config, values },
      ],
    });
    for (const field of frame.fields) {
      field.state = { seriesIndex };
      field.display = getDisplayProcessor({ field, theme, timeZone });
    }
    return frame;
  });
}

function Series({ panel, width, height }) {
  return (
    <TimeSeries frames={frames(panel)} width={width} height={height} timeRange={timeRange} timeZone={timeZone}
      legend={panel.options.legend} options={panel.options} />
  );
}

function Stat({ panel, width, height }) {
  const { reduceOptions, colorMode, graphMode, textMode } = panel.options;
  const values = getFieldDisplayValues({
    data: frames(panel), fieldConfig: panel.fieldConfig, reduceOptions, theme, timeZone, replaceVariables: (text) => text,
  });
  return (
    <VizRepeater source={values} getValues={() => values} getAlignmentFactors={getDisplayValueAlignmentFactors} renderCounter={0}
      width={width} height={height} autoGrid orientation={VizOrientation.Auto}
      renderValue={({ value, alignmentFactors, orientation, width, height, count }) => (
        <BigValue value={value.display} alignmentFactors={alignmentFactors} parentOrientation={orientation} count={count}
          width={width} height={height} colorMode={colorMode} graphMode={graphMode} textMode={textMode} theme={theme} />
      )} />
  );
}

// HeatMap has a row for each bucket of the histogram, and a colored cell for how many fell into it.
function HeatMap({ panel, width, height }) {
  const buckets = answers[panel.id].toSorted((a, b) => a.name.replace('+Inf', 'Infinity') - b.name.replace('+Inf', 'Infinity'));
  const cells = buckets.flatMap(({ times, values }, row) => times.map((time, i) => (
    { time, row, count: values[i] - (row ? buckets[row - 1].values[i] : 0) } // le counts all that is quicker, too
  ))).filter(({ count }) => count > 1e-9);
  const color = scaleSequentialSqrt(interpolateOranges).domain([Math.max(...cells.map(({ count }) => count)), 0]);

  const builder = new UPlotConfigBuilder(timeZone);
  builder.addScale({ scaleKey: 'x', isTime: true, orientation: ScaleOrientation.Horizontal, direction: ScaleDirection.Right, range: () => [from, to] });
  builder.addAxis({ scaleKey: 'x', isTime: true, placement: AxisPlacement.Bottom, grid: { show: false }, timeZone, theme });
  builder.addScale({ scaleKey: 'y', isTime: false, orientation: ScaleOrientation.Vertical, direction: ScaleDirection.Up, range: () => [0, buckets.length] });
  builder.addAxis({
    scaleKey: 'y', placement: AxisPlacement.Left, grid: { show: false }, theme,
    splits: () => buckets.map((_, row) => row + 1).filter((row) => row % 3 === 0),
    formatValue: (row) => format(panel.options.yAxis.unit, Number(buckets[row - 1].name)),
  });
  builder.addHook('draw', (u) => {
    for (const { time, row, count } of cells) {
      const [left, right] = [time - step, time].map((x) => Math.round(u.valToPos(x, 'x', true)));
      const [bottom, top] = [row, row + 1].map((y) => Math.round(u.valToPos(y, 'y', true)));
      u.ctx.fillStyle = color(count);
      u.ctx.fillRect(left, top, right - left - 1, bottom - top - 1);
    }
  });
  return <UPlotChart config={builder} data={[[from, to]]} width={width} height={height} />;
}

const kinds = { timeseries: Series, stat: Stat, heatmap: HeatMap };

function Panel({ panel }) {
  const { left, top, width, height } = place(panel.gridPos);
  const style = { position: 'absolute', left, top, width, height };
  if (panel.type === 'row') {
    return <div style={{ ...style, ...theme.typography.h6, lineHeight: `${height}px` }}>⌄ {panel.title}</div>;
  }
  const Kind = kinds[panel.type];
  const about = panel.description && <span style={{ color: theme.colors.text.secondary }}>(i)</span>;
  return (
    <div style={style}>
      <PanelChrome title={panel.title} titleItems={about} width={width} height={height}>
        {(width, height) => (answers[panel.id].length > 0
          ? <Kind panel={panel} width={width} height={height} />
          : <div style={{ textAlign: 'center', lineHeight: `${height}px` }}>{panel.fieldConfig.defaults.noValue ?? 'No data'}</div>)}
      </PanelChrome>
    </div>
  );
}

function Dashboard() {
  const time = (t) => dateTimeFormat(t, { timeZone });
  return (
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <div style={{ ...theme.typography.body, color: theme.colors.text.primary, padding: `${gap}px ${2 * gap}px`, display: 'flex', gap: 4 * gap, height: 40, boxSizing: 'border-box' }}>
        <b>{dashboard.title}</b>
        {dashboard.templating.list.filter(({ type }) => type === 'query').map(({ name, label }) => <span key={name}>{label}: All</span>)}
        <span style={{ marginLeft: 'auto' }}>{time(from)} to {time(to)} {timeZone.toUpperCase()}</span>
      </div>
      <div style={{ position: 'relative' }}>{dashboard.panels.map((panel) => <Panel key={panel.id} panel={panel} />)}</div>
    </ThemeContext.Provider>
  );
}

Object.assign(document.body.style, { margin: 0, background: theme.colors.background.canvas, fontFamily: theme.typography.fontFamily });
createRoot(document.body.appendChild(document.createElement('div'))).render(<Dashboard />);
