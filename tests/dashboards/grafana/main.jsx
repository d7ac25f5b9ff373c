// Draws one dashboard: `window.DASHBOARD` is its JSON, `window.ANSWERS` what Prometheus answered to each query (by panel
// id and refId), `window.SHOWN` the time shown in milliseconds. Layout, units, thresholds, mappings, overrides and
// transformations are read from the JSON and applied by Grafana's own libraries; only this frame around them is ours.

// require: Grafana's ES modules count on a bundler that reads the defaults of CommonJS modules in another way than Node.
const React = require('react');
const { createRoot } = require('react-dom/client');
const {
  createTheme, dateTime, FieldType, fieldMatchers, getDisplayProcessor, getFieldDisplayValues, renderTextPanelMarkdown,
  standardTransformers, standardTransformersRegistry, ThemeContext, toDataFrame, transformDataFrame,
} = require('@grafana/data');
const { BarGauge, BigValue, GlobalStyles, PanelChrome, Table, TimeSeries } = require('@grafana/ui');
const { firstValueFrom } = require('rxjs');
const inter = require('@fontsource-variable/inter/files/inter-latin-wght-normal.woff2');
const uplot = require('uplot/dist/uPlot.min.css');

const CELL = 30, GAP = 8, WIDTH = window.innerWidth, HEADER = 72;
const COLUMN = (WIDTH - GAP) / 24;
// Grafana's font, under a name that its own styles, which look for the files of a Grafana server, do not take.
const FONT = 'Inter Variable';
const theme = createTheme({ colors: { mode: 'light' }, typography: { fontFamily: `'${FONT}', sans-serif` } });
const timeRange = { from: dateTime(SHOWN[0]), to: dateTime(SHOWN[1]), raw: { from: 'now-1h', to: 'now' } };

standardTransformersRegistry.setInit(() =>
  // Some are exported under two names.
  [...new Map(Object.values(standardTransformers).map((each) => [each.id, each])).values()].map((transformation) => ({
    id: transformation.id, transformation,
  }))
);

// Frames, as Grafana's Prometheus data source makes them

function frames(panel) {
  return panel.targets.flatMap((target) => {
    const answer = ANSWERS[panel.id + target.refId];
    return target.format === 'table' ? [tableFrame(panel, target, answer)] : answer.map((each) => seriesFrame(target, each));
  });
}

function tableFrame(panel, target, answer) {
  const labels = [...new Set(answer.flatMap((each) => Object.keys(each.metric)))];
  const name = panel.targets.length > 1 ? `Value #${target.refId}` : 'Value';
  return toDataFrame({
    refId: target.refId,
    fields: [
      { name: 'Time', type: FieldType.time, values: answer.map((each) => each.value[0] * 1000) },
      ...labels.map((label) => ({ name: label, type: FieldType.string, values: answer.map((each) => each.metric[label]) })),
      { name, type: FieldType.number, values: answer.map((each) => number(each.value[1])) },
    ],
  });
}

function seriesFrame(target, { metric, value, values = [value] }) {
  const { __name__, ...labels } = metric;
  const name = target.legendFormat.replace(/\{\{(\w+)\}\}/g, (_, label) => labels[label] ?? '');
  return toDataFrame({
    refId: target.refId,
    fields: [
      { name: 'Time', type: FieldType.time, values: values.map(([time]) => time * 1000) },
      {
        name: 'Value', type: FieldType.number, labels, config: { displayNameFromDS: name || undefined },
        values: values.map(([, text]) => number(text)),
      },
    ],
  });
}

function number(text) {
  return text === '+Inf' ? Infinity : text === '-Inf' ? -Infinity : parseFloat(text);
}

// A range query has no sample where there is none; Grafana asks for a gap to be seen as one.
function withGaps(frame, step) {
  const [time, ...others] = frame.fields;
  const at = [];
  time.values.forEach((moment, index) => {
    if (index && moment - time.values[index - 1] > 1.5 * step) at.push(index);
  });
  if (!at.length) return frame;
  const insert = (values, value) => values.flatMap((each, index) => (at.includes(index) ? [value(index), each] : [each]));
  return toDataFrame({
    ...frame,
    fields: [
      { ...time, values: insert(time.values, (index) => time.values[index] - 1) },
      ...others.map((field) => ({ ...field, values: insert(field.values, () => null) })),
    ],
  });
}

// Field configuration: the defaults, then each override whose matcher fits

function configured(panel, data) {
  let index = 0;
  for (const frame of data) {
    for (const field of frame.fields) {
      const config = structuredClone(panel.fieldConfig.defaults);
      if (field.type !== FieldType.number) delete config.unit;
      Object.assign(config, field.config);
      for (const { matcher, properties } of panel.fieldConfig.overrides) {
        if (!fieldMatchers.get(matcher.id).get(matcher.options)(field, frame, data)) continue;
        for (const { id, value } of properties) set(config, id.split('.'), value);
      }
      field.config = config;
      field.state = { ...field.state, seriesIndex: field.type === FieldType.number ? index++ : undefined };
      field.display = getDisplayProcessor({ field, theme });
    }
  }
  return data;
}

function set(object, [first, ...rest], value) {
  if (!rest.length) object[first] = value;
  else set((object[first] ??= {}), rest, value);
}

// Panels

function Stat({ panel, data, width, height }) {
  const values = displayed(panel, data);
  if (!values.length) return <Nothing panel={panel} />;
  return (
    <div style={{ display: 'flex' }}>
      {values.map(({ display }, index) => (
        <BigValue
          key={index} value={display} width={width / values.length} height={height} theme={theme}
          colorMode={panel.options.colorMode} graphMode={panel.options.graphMode} textMode={panel.options.textMode}
          justifyMode={panel.options.justifyMode}
        />
      ))}
    </div>
  );
}

function Bars({ panel, data, width, height }) {
  const values = displayed(panel, data);
  if (!values.length) return <Nothing panel={panel} />;
  const each = height / values.length;
  return values.map(({ display, field }, index) => (
    <BarGauge
      key={index} theme={theme} field={field} display={(value) => ({ text: String(value), numeric: value })}
      value={display} width={width} height={Math.min(each, 28)} itemSpacing={4} orientation={panel.options.orientation}
      displayMode={panel.options.displayMode} valueDisplayMode={panel.options.valueMode}
      showUnfilled={panel.options.showUnfilled} alignmentFactors={widest(values)} namePlacement={panel.options.namePlacement}
      text={panel.options.text}
    />
  ));
}

function widest(values) {
  const longest = (of) => values.map(of).reduce((a, b) => (b.length > a.length ? b : a), '');
  // Titles are measured in a font called Inter, which is not here: the browser's own is narrower.
  return { title: `${longest(({ display }) => display.title ?? '')}MMMM`, text: longest(({ display }) => display.text) };
}

function displayed(panel, data) {
  return getFieldDisplayValues({
    data, theme, timeZone: 'utc', fieldConfig: panel.fieldConfig, reduceOptions: panel.options.reduceOptions,
    replaceVariables: (text) => text,
  }).filter(({ display }) => data.length && !Number.isNaN(display.numeric));
}

function Lines({ panel, data, width, height }) {
  if (!data.length) return <Nothing panel={panel} />;
  return (
    <TimeSeries
      frames={data} width={width} height={height} timeRange={timeRange} timeZone="utc"
      legend={{ ...panel.options.legend, calcs: panel.options.legend.calcs }} options={panel.options}
    />
  );
}

function Rows({ panel, data, width, height }) {
  if (!data.length || !data[0].length) return <Nothing panel={panel} />;
  return <Table data={data[0]} width={width} height={height} cellHeight={panel.options.cellHeight} />;
}

function Nothing({ panel }) {
  return <p style={{ textAlign: 'center', marginTop: 24 }}>{panel.fieldConfig.defaults.noValue ?? 'No data'}</p>;
}

const KINDS = { stat: Stat, bargauge: Bars, timeseries: Lines, table: Rows };

function Panel({ panel, data }) {
  const { x, y, w, h } = panel.gridPos;
  const width = w * COLUMN - GAP, height = h * (CELL + GAP) - GAP;
  const Kind = KINDS[panel.type];
  return (
    <div style={{ position: 'absolute', left: GAP + x * COLUMN, top: HEADER + y * (CELL + GAP) }}>
      <PanelChrome title={panel.title} width={width} height={height}>
        {(innerWidth, innerHeight) =>
          Kind ? <Kind panel={panel} data={data} width={innerWidth} height={innerHeight} /> : (
            <div className="markdown-html" dangerouslySetInnerHTML={{ __html: renderTextPanelMarkdown(panel.options.content) }} />
          )
        }
      </PanelChrome>
    </div>
  );
}

function Dashboard({ data }) {
  const bottom = Math.max(...DASHBOARD.panels.map(({ gridPos }) => gridPos.y + gridPos.h));
  const shown = `${timeRange.from.utc().format('YYYY-MM-DD HH:mm:ss')} to ${timeRange.to.utc().format('HH:mm:ss')} UTC`;
  return (
    <div id="drawn" style={{ position: 'relative', height: HEADER + bottom * (CELL + GAP), background: theme.colors.background.canvas }}>
      <div style={{ padding: `10px ${GAP * 2}px` }}>
        <h2 style={{ margin: 0 }}>{DASHBOARD.title}</h2>
        {DASHBOARD.description} {shown}.
      </div>
      {DASHBOARD.panels.map((panel) => <Panel key={panel.id} panel={panel} data={data[panel.id]} />)}
    </div>
  );
}

async function draw() {
  const data = {};
  for (const panel of DASHBOARD.panels.filter(({ targets }) => targets)) {
    const raw = frames(panel).map((frame) => (panel.type === 'timeseries' ? withGaps(frame, STEP * 1000) : frame));
    const transformed = await firstValueFrom(transformDataFrame(panel.transformations ?? [], raw));
    data[panel.id] = configured(panel, transformed);
  }
  document.head.append(Object.assign(document.createElement('style'), { textContent: uplot }));
  document.fonts.add(await new FontFace(FONT, `url(${inter})`, { weight: '100 900' }).load());
  createRoot(document.getElementById('root')).render(
    <ThemeContext.Provider value={theme}>
      <GlobalStyles isExtensionSidebarOpen={false} />
      <Dashboard data={data} />
    </ThemeContext.Provider>
  );
}

draw();
