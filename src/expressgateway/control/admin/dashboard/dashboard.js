// Draws what /api/v1/events tells. Numbers are worked out by the gateway; nothing here adds or divides them.
// All text goes in as text: what a backend or a configuration says is never read as markup.
'use strict';

const TOKEN_KEY = 'expressgateway-token';
const SILENCE_MS = 12000; // the gateway says something at least every five seconds
const LONGEST_WAIT_S = 10;
const SECONDS_SHOWN = 120;

const byId = (id) => document.getElementById(id);

// -- words for numbers

const DASH = '–';
const plain = new Intl.NumberFormat('en', { maximumFractionDigits: 0 });

function rate(value) {
  if (value === null || value === undefined) return DASH;
  if (value === 0) return '0';
  if (value < 0.01) return '< 0.01';
  if (value < 10) return value.toFixed(value < 1 ? 2 : 1);
  return plain.format(value);
}

function span(ms) {
  if (ms === null || ms === undefined) return DASH;
  if (ms >= 10000) return '≥ 10 s';
  if (ms >= 1000) return (ms / 1000).toFixed(1) + ' s';
  if (ms >= 100) return ms.toFixed(0) + ' ms';
  return ms.toFixed(ms >= 10 ? 1 : 2) + ' ms';
}

function size(bytes) {
  if (bytes === null || bytes === undefined) return DASH;
  const units = ['B', 'kB', 'MB', 'GB', 'TB'];
  let unit = 0;
  while (bytes >= 1000 && unit < units.length - 1) { bytes /= 1000; unit += 1; }
  return (bytes >= 10 || unit === 0 ? bytes.toFixed(0) : bytes.toFixed(1)) + ' ' + units[unit];
}

function bandwidth(bytes) { return bytes === null || bytes === undefined ? DASH : size(bytes) + '/s'; }

function lasting(seconds) {
  seconds = Math.max(0, Math.floor(seconds));
  for (const [length, unit] of [[86400, 'd'], [3600, 'h'], [60, 'min']]) {
    if (seconds >= 2 * length) return Math.floor(seconds / length) + ' ' + unit;
  }
  return seconds + ' s';
}

function classes(found) {
  const parts = Object.keys(found).sort().filter((name) => name !== 'none').map((name) => name + ' ' + rate(found[name]));
  if (found.none) parts.push('no answer ' + rate(found.none));
  return parts.join(' · ');
}

function counted(number, noun) { return plain.format(number) + ' ' + noun + (number === 1 ? '' : 's'); }

const LEVELS = {
  serving: 'good', healthy: 'good', ready: 'good', attached: 'good', 'not attached': 'bad',
  ejected: 'bad', unhealthy: 'bad', stopped: 'bad', dead: 'bad', gone: 'bad',
  draining: 'warn', settling: 'warn', booting: 'warn', starting: 'warn', 'slow start': 'warn',
  disabled: 'off',
};
const levelOf = (state) => LEVELS[state] || 'info';

// -- drawing, touching only what changed

function write(node, text) { if (node.textContent !== text) node.textContent = text; }

function mark(node, name, value) { if (node.getAttribute(name) !== value) node.setAttribute(name, value); }

function made(name, attributes, text) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function drawn(name, attributes) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

// Children of `host` for `rows`, by key, in their order; a node that stays keeps the focus it has.
function keyed(host, rows, key, make, update) {
  const known = host.keyedNodes || (host.keyedNodes = new Map());
  const wanted = new Set(rows.map(key));
  for (const [name, node] of known) {
    if (!wanted.has(name)) { node.remove(); known.delete(name); }
  }
  let at = host.firstChild;
  for (const row of rows) {
    let node = known.get(key(row));
    if (!node) { node = make(row); known.set(key(row), node); }
    if (node === at) at = at.nextSibling;
    else host.insertBefore(node, at);
    update(node, row);
  }
}

// A table: columns are { label, text(row), kind, level(row), loud(row), act(row) }. Kinds: name (the row's header),
// n (a number), state, cause, wide, act (a button). Roles are written out, for on a phone rows are shown as cards.
class Table {
  constructor(host, caption, columns, key, empty) {
    this.host = host;
    this.columns = columns;
    this.key = key;
    this.table = made('table', { role: 'table', 'aria-label': caption });
    const head = made('thead', { role: 'rowgroup' });
    const line = made('tr', { role: 'row' });
    for (const column of columns) {
      const cell = made('th', { role: 'columnheader', scope: 'col' }, column.label);
      if (column.kind === 'n') cell.className = 'is-n';
      line.append(cell);
    }
    head.append(line);
    this.body = made('tbody', { role: 'rowgroup' });
    this.table.append(head, this.body);
    this.note = made('p', { class: 'empty' }, empty || 'None.');
    host.append(this.table, this.note);
  }

  update(rows) {
    this.table.hidden = !rows.length;
    this.note.hidden = rows.length > 0;
    keyed(this.body, rows, this.key, () => this.makeRow(), (line, row) => this.fill(line, row));
  }

  makeRow() {
    const line = made('tr', { role: 'row' });
    line.classList.toggle('has-act', this.columns.some((column) => column.kind === 'act'));
    for (const column of this.columns) {
      const isName = column.kind === 'name';
      const cell = made(isName ? 'th' : 'td', { role: isName ? 'rowheader' : 'cell' });
      if (isName) cell.scope = 'row';
      else cell.dataset.label = column.label;
      if (column.kind && !isName) cell.className = 'is-' + column.kind;
      if (column.kind === 'state') cell.append(made('span', { class: 'state' }));
      if (column.kind === 'act') {
        const button = made('button', { type: 'button', class: 'small' }, column.text());
        button.addEventListener('click', () => column.act(line.shownRow));
        cell.append(button);
        cell.classList.add('bare');
      }
      line.append(cell);
    }
    return line;
  }

  fill(line, row) {
    line.shownRow = row;
    this.columns.forEach((column, at) => {
      const cell = line.children[at];
      if (column.kind === 'act') {
        mark(cell.firstChild, 'aria-label', column.label + ': ' + this.key(row));
        return;
      }
      const text = column.text(row);
      if (column.kind === 'state') {
        write(cell.firstChild, text);
        mark(cell.firstChild, 'data-level', levelOf(column.level ? column.level(row) : text));
        return;
      }
      write(cell, text);
      cell.classList.toggle('blank', text === '');
      cell.classList.toggle('loud', Boolean(column.loud && column.loud(row)));
    });
  }
}

// A curve of the last two minutes for each of `lines`: { points: [[at, value or null]], class }.
function curve(host, label, now, lines) {
  const top = Math.max(1e-9, ...lines.flatMap((line) => line.points.map((point) => point[1] || 0)));
  const height = (value) => (42 - 38 * (value / top)).toFixed(1);
  let svg = host.firstChild;
  if (!svg) {
    svg = drawn('svg', { viewBox: '0 0 ' + SECONDS_SHOWN + ' 44', preserveAspectRatio: 'none', role: 'img' });
    svg.append(drawn('path', { class: 'base', d: 'M0 42H' + SECONDS_SHOWN }));
    for (const line of lines) {
      if (line.area) svg.append(drawn('path', { class: 'area' }));
      svg.append(drawn('path', { class: line.class || '' }));
    }
    host.append(svg);
  }
  mark(svg, 'aria-label', label);
  let at = 1;
  for (const line of lines) {
    let path = '';
    let area = '';
    let last = null; // x of the point before, if the line goes on from it
    let lastAt = 0;
    for (const [moment, value] of line.points) {
      const x = SECONDS_SHOWN - (now - moment);
      if (x < 0) continue;
      if (value === null) {
        if (last !== null) area += 'L' + last + ' 42Z';
        last = null;
        continue;
      }
      if (last !== null && moment - lastAt > 4) { area += 'L' + last + ' 42Z'; last = null; }
      const place = x.toFixed(1) + ' ' + height(value);
      path += (last === null ? 'M' : 'L') + place;
      area += last === null ? 'M' + x.toFixed(1) + ' 42L' + place : 'L' + place;
      last = x.toFixed(1);
      lastAt = moment;
    }
    if (last !== null) area += 'L' + last + ' 42Z';
    if (line.area) { svg.children[at].setAttribute('d', area); at += 1; }
    svg.children[at].setAttribute('d', path);
    at += 1;
  }
}

function pairs(host, rows) {
  keyed(host, rows, (row) => row[0], (row) => {
    const line = made('div');
    line.append(made('dt', {}, row[0]), made('dd'));
    return line;
  }, (line, row) => write(line.lastChild, row[1]));
}

// -- the tables

const latency = ['p50', 'p90', 'p99'].map((name) => ({ label: name, kind: 'n', text: (row) => span(row[name]) }));

const tables = {
  xdp: new Table(byId('xdp-listeners'), 'Listeners in the kernel', [
    { label: 'Listener', kind: 'name', text: (row) => row.name },
    { label: 'Forwarding', text: (row) => row.forwarding },
    { label: 'Backends', kind: 'n', text: (row) => String(row.backends), loud: (row) => row.backends === 0 },
    { label: 'Flows/s', kind: 'n', text: (row) => rate(row.flows_ps) },
    { label: 'Packets in/s', kind: 'n', text: (row) => rate(row.in_pps) },
    { label: 'Packets out/s', kind: 'n', text: (row) => rate(row.out_pps) },
    { label: 'In', kind: 'n', text: (row) => bandwidth(row.in_bps) },
    { label: 'Out', kind: 'n', text: (row) => bandwidth(row.out_bps) },
    { label: 'Passed on/s', kind: 'n', text: (row) => rate(row.passed_ps) },
    { label: 'Dropped/s', kind: 'n', text: (row) => rate(row.dropped_ps), loud: (row) => row.dropped_ps > 0 },
  ], (row) => row.name, 'No listener.'),
  interfaces: new Table(byId('xdp-interfaces'), 'Interfaces', [
    { label: 'Interface', kind: 'name', text: (row) => row.name },
    { label: 'State', kind: 'state', text: (row) => (row.is_attached ? 'attached' : 'not attached') },
    { label: 'Mode', text: (row) => row.mode || DASH },
    { label: 'Cause', kind: 'cause', text: (row) => row.fault },
  ], (row) => row.name, 'No interface.'),
  listeners: new Table(byId('listeners'), 'Listeners', [
    { label: 'Listener', kind: 'name', text: (row) => row.name },
    { label: 'Address', kind: 'wide', text: (row) => row.bound },
    { label: 'Protocol', text: (row) => row.protocol },
    { label: 'Open', kind: 'n', text: (row) => plain.format(row.open) },
    { label: 'New/s', kind: 'n', text: (row) => rate(row.connections_ps) },
    { label: 'Requests/s', kind: 'n', text: (row) => rate(row.rps) },
    ...latency,
    { label: 'In', kind: 'n', text: (row) => bandwidth(row.in_bps) },
    { label: 'Out', kind: 'n', text: (row) => bandwidth(row.out_bps) },
    { label: 'Statuses/s', kind: 'wide', text: (row) => classes(row.classes) },
  ], (row) => row.name),
  routes: new Table(byId('routes'), 'Routes', [
    { label: 'Route', kind: 'name', text: (row) => row.route },
    { label: 'Listener', text: (row) => row.listener },
    { label: 'Requests/s', kind: 'n', text: (row) => rate(row.rps) },
    { label: 'Errors/s', kind: 'n', text: (row) => rate(row.errors_ps), loud: (row) => row.errors_ps > 0 },
    ...latency,
  ], (row) => row.listener + ' ' + row.route, 'No exchange has ended yet.'),
  errors: reasons('errors', 'Errors by reason', 'The gateway answered nothing by itself.'),
  security: reasons('security', 'Refused and stopped', 'Nothing was refused or stopped.'),
  workers: new Table(byId('workers'), 'Workers', [
    { label: 'Worker', kind: 'name', text: (row) => 'Worker ' + row.index },
    { label: 'PID', kind: 'n', text: (row) => (row.pid === null ? DASH : String(row.pid)) },
    { label: 'State', kind: 'state', text: (row) => row.state },
    { label: 'CPU', kind: 'n', text: (row) => (row.cpu_percent === null ? DASH : row.cpu_percent.toFixed(0) + ' %') },
    { label: 'Memory', kind: 'n', text: (row) => size(row.rss_bytes) },
    { label: 'Loop lag', kind: 'n', text: (row) => span(row.lag_ms) },
    { label: 'Restarts', kind: 'n', text: (row) => String(row.restarts), loud: (row) => row.restarts > 0 },
  ], (row) => String(row.index)),
  certificates: new Table(byId('certificates'), 'Certificates', [
    { label: 'Listener', kind: 'name', text: (row) => row.listener },
    { label: 'Subject', text: (row) => row.subject },
    { label: 'Expires', kind: 'n', text: (row) => new Date(row.expires_at * 1000).toISOString().slice(0, 10) },
    { label: 'In', kind: 'n', text: (row) => (row.left_s > 0 ? lasting(row.left_s) : 'expired'), loud: (row) => row.left_s < 14 * 86400 },
  ], (row) => row.listener + ' ' + row.subject),
};

function reasons(id, caption, empty) {
  return new Table(byId(id), caption, [
    { label: 'Reason', kind: 'name', text: (row) => row.reason.replaceAll('_', ' ') },
    { label: 'Listener', text: (row) => row.listener },
    { label: 'Per second', kind: 'n', text: (row) => rate(row.ps), loud: (row) => row.ps > 0 },
    { label: 'In all', kind: 'n', text: (row) => plain.format(row.total) },
  ], (row) => row.listener + ' ' + row.reason, empty);
}

let now = 0; // the gateway's clock, not the browser's

function probed(row) {
  if (!row.last_probe) return '';
  return (row.last_probe.ok ? 'ok in ' : 'failed in ') + span(row.last_probe.took_ms) + ', ' + lasting(now - row.last_probe.at) + ' ago';
}

function stateOf(row) { return row.slow_start && row.state !== 'draining' ? 'slow start' : row.state; }

function causeOf(row) {
  const isPlain = row.state === 'healthy' || row.state === 'unknown';
  const age = lasting(now - row.since);
  return isPlain ? 'for ' + age : row.cause + ' (' + age + ' ago)';
}

function makePool(pool) {
  const section = made('section', { class: 'pool', 'aria-label': 'Pool ' + pool.name });
  const head = made('div', { class: 'pool-head' });
  head.append(made('h3', {}, pool.name), made('span', { class: 'note' }));
  section.append(head, made('p', { class: 'pool-warning' }));
  section.board = new Table(section, 'Backends of pool ' + pool.name, [
    { label: 'Backend', kind: 'name', text: (row) => row.id },
    { label: 'State', kind: 'state', text: stateOf },
    { label: 'Cause', kind: 'cause', text: causeOf },
    { label: 'Weight', kind: 'n', text: (row) => String(row.weight) },
    { label: 'In flight', kind: 'n', text: (row) => plain.format(row.in_flight) },
    { label: 'Requests/s', kind: 'n', text: (row) => rate(row.rps) },
    { label: 'Errors/s', kind: 'n', text: (row) => rate(row.errors_ps), loud: (row) => row.errors_ps > 0 },
    { label: 'Ejections', kind: 'n', text: (row) => String(row.ejections) },
    { label: 'Last probe', kind: 'probe', text: probed, loud: (row) => row.last_probe && !row.last_probe.ok },
    { label: 'Change', kind: 'act', text: () => 'Change…', act: (row) => askState(section.poolName, row) },
  ], (row) => row.id, 'No backends.');
  section.append(made('p', { class: 'note more' }));
  return section;
}

function fillPool(section, pool) {
  section.poolName = pool.name;
  const states = Object.entries(pool.states).map(([state, number]) => number + ' ' + state).join(', ');
  const facts = [pool.policy, states || 'no backends', rate(pool.rps) + ' requests/s', rate(pool.errors_ps) + ' errors/s',
    plain.format(pool.in_flight) + ' in flight', rate(pool.retries_ps) + ' retries/s', counted(pool.ejections, 'ejection')];
  write(section.querySelector('.pool-head .note'), facts.join(' · '));
  const warning = section.querySelector('.pool-warning');
  const text = pool.warning || (pool.panic ? 'Too few backends are well, so all are used.' : '');
  write(warning, text);
  warning.hidden = !text;
  section.board.update(pool.backends);
  const more = section.querySelector('.more');
  more.hidden = !pool.more;
  write(more, pool.more ? counted(pool.more, 'more backend') + ' not shown; those that are not well come first' : '');
}

// -- one picture

let points = [];

function show(picture) {
  now = picture.at;
  const { gateway, totals } = picture;
  write(byId('gateway-state'), gateway.state);
  mark(byId('gateway-state'), 'data-level', levelOf(gateway.state));
  write(byId('gateway-facts'), 'version ' + gateway.version + ' · up ' + lasting(gateway.uptime_s) + ' · configuration ' + picture.config.version);
  byId('reload').disabled = gateway.state !== 'serving';
  document.title = (picture.attention.some((one) => one.level === 'bad') ? '! ' : '') + 'ExpressGateway';

  const said = picture.attention.length ? picture.attention : [{ level: 'good', text: 'Everything is as it should be' }];
  keyed(byId('attention-list'), said, (one) => one.level + one.text, () => made('li'), (line, one) => {
    write(line, one.text);
    mark(line, 'data-level', one.level);
  });

  points.push([picture.at, totals.rps, totals.p50, totals.p99, totals.errors_ps]);
  points = points.filter((point) => now - point[0] <= SECONDS_SHOWN + 2);
  const column = (at) => points.map((point) => [point[0], point[at]]);
  write(byId('t-rps'), rate(totals.rps));
  write(byId('t-classes'), classes(totals.classes) || '\u00a0');
  write(byId('t-p50'), span(totals.p50));
  write(byId('t-p90'), span(totals.p90));
  write(byId('t-p99'), span(totals.p99));
  write(byId('t-errors'), rate(totals.errors_ps));
  byId('t-errors').classList.toggle('loud', totals.errors_ps > 0);
  write(byId('t-open'), plain.format(totals.open));
  write(byId('t-cps'), rate(totals.connections_ps) + ' /s');
  write(byId('t-in'), bandwidth(totals.in_bps));
  write(byId('t-out'), bandwidth(totals.out_bps));
  curve(byId('s-rps'), 'Requests per second over the last two minutes', now, [{ points: column(1), area: true }]);
  curve(byId('s-latency'), 'Median and p99 of the latency over the last two minutes', now,
    [{ points: column(3), class: 'tail' }, { points: column(2), area: true }]);
  curve(byId('s-errors'), 'Errors per second over the last two minutes', now, [{ points: column(4), area: true }]);

  showDrain(picture);
  tables.listeners.update(picture.listeners);
  showXdp(picture.xdp);
  tables.routes.update(picture.routes);
  tables.errors.update(picture.errors);
  tables.security.update([...picture.security, ...picture.refused]);
  tables.workers.update(picture.workers);
  tables.certificates.update(picture.certificates.map((one) => ({ ...one, left_s: one.expires_at - now })));
  byId('certificates-card').hidden = !picture.certificates.length;
  keyed(byId('pools'), picture.pools, (pool) => pool.name, makePool, fillPool);
  const cuts = [];
  if (picture.more_pools) cuts.push(counted(picture.more_pools, 'more pool') + ' not shown');
  write(byId('pools-note'), cuts.join(', '));

  const { config, reload } = picture;
  pairs(byId('config'), [
    ['File', config.path],
    ['Version', config.version + ', in force for ' + lasting(now - config.applied_at)],
    ['Reloads', reload.finished < reload.requested ? 'one is under way' : counted(reload.finished, 'reload') + ' done'],
    ['Last reload', reload.last_result === null ? 'none yet' : reload.last_result],
    ['Its plan', reload.last_report.join('; ') || DASH],
  ]);
  const limits = picture.limits;
  write(byId('foot'), 'Rates over the last ' + (picture.measured_s === null ? 'few seconds, still being measured' : picture.measured_s + ' s')
    + ', latency over the last ten seconds. Bytes are those of bodies and of relayed streams. Shown are at most ' + limits.backends + ' backends of a pool, '
    + limits.rows + ' in all, ' + limits.pools + ' pools, ' + limits.listeners + ' listeners and ' + limits.routes + ' routes.');
}

function showXdp(xdp) {
  byId('xdp-card').hidden = !xdp;
  if (!xdp) return;
  write(byId('xdp-note'), xdp.state + ' · ' + counted(xdp.flows, 'flow') + ' of at most ' + plain.format(xdp.max_flows)
    + ' in each address family · ' + plain.format(xdp.evictions) + ' made room');
  tables.xdp.update(xdp.listeners);
  tables.interfaces.update(xdp.interfaces);
}

function showDrain(picture) {
  const drain = picture.drain;
  byId('drain').hidden = !drain;
  if (!drain) return;
  const phase = 'finish' in drain.phases ? 'finish' : 'settle';
  const took = drain.phases[phase];
  const limit = drain.limits[phase];
  const host = byId('drain-progress');
  if (!host.firstChild) {
    const svg = drawn('svg', { viewBox: '0 0 100 8', preserveAspectRatio: 'none', role: 'img' });
    svg.append(drawn('rect', { width: 100, height: 8 }), drawn('rect', { class: 'done', height: 8, width: 0 }));
    host.append(svg);
  }
  mark(host.firstChild.lastChild, 'width', String(limit ? Math.min(100, 100 * took / limit) : 100));
  mark(host.firstChild, 'aria-label', lasting(took) + ' of at most ' + lasting(limit));
  const open = Object.entries(drain.open).map(([name, number]) => name + ' ' + number).join(', ');
  write(byId('drain-note'), (phase === 'settle' ? 'Unready and still accepting' : 'Accepting nothing more') + ': '
    + lasting(took) + ' of at most ' + lasting(limit) + '. ' + (open ? 'Still open: ' + open + '.' : 'Nothing is open.'));
}

// -- asking

function token() { return sessionStorage.getItem(TOKEN_KEY) || ''; }

function authorization() { return token() ? { Authorization: 'Bearer ' + token() } : {}; }

async function change(method, path, body) {
  let response;
  try {
    response = await fetch(path, {
      method, body: JSON.stringify(body), cache: 'no-store',
      headers: { ...authorization(), 'Content-Type': 'application/json' },
    });
  } catch {
    throw new Error('The gateway does not answer.');
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error((answer.details || []).join('; ') || answer.error || 'Refused with status ' + response.status + '.');
  return answer;
}

// A dialog that does `work` when it is confirmed, and says what stands against it.
function ask(name, work) {
  const dialog = byId(name + '-dialog');
  const fault = byId(name + '-fault');
  byId(name + '-cancel').addEventListener('click', () => dialog.close());
  byId(name + '-form').addEventListener('submit', async (event) => {
    event.preventDefault();
    const button = event.submitter || byId(name + '-form').querySelector('.primary');
    button.disabled = true;
    try {
      await work();
      dialog.close();
    } catch (error) {
      write(fault, error.message);
      fault.hidden = false;
    } finally {
      button.disabled = false;
    }
  });
  return () => { fault.hidden = true; dialog.showModal(); };
}

let asked = null; // the backend that the dialog is about

const openBackend = ask('backend', () => {
  const state = new FormData(byId('backend-form')).get('state');
  const path = ['/api/v1/pools', encodeURIComponent(asked.pool), 'backends', encodeURIComponent(asked.id)].join('/');
  return change('PATCH', path, { state });
});

function askState(pool, row) {
  asked = { pool, id: row.id };
  write(byId('backend-name'), row.id + ' of pool ' + pool + ' is ' + row.state + '.');
  const current = ['draining', 'disabled'].includes(row.state) ? row.state : 'ready';
  for (const input of byId('backend-form').elements.state) input.checked = input.value === current;
  openBackend();
}

byId('reload').addEventListener('click', ask('reload', () => change('POST', '/api/v1/reload', {})));

// -- the stream

// Events of one answer, until it ends. Throws if it is cut.
async function* events(body, heard) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    heard();
    const blocks = (rest + value).split('\n\n');
    rest = blocks.pop();
    for (const block of blocks) {
      const name = /^event: (.*)$/m.exec(block);
      const data = /^data: (.*)$/m.exec(block);
      if (name && data) yield [name[1], JSON.parse(data[1])];
    }
  }
}

// The seconds are not read out: only a change of the text is.
function banner(text, left) {
  write(byId('banner-text'), text);
  write(byId('banner-wait'), left ? 'Trying again in ' + left + ' s.' : '');
  byId('banner').hidden = !text;
  document.documentElement.classList.toggle('stale', Boolean(text));
}

// Why it ended: 'token' if one is wanted, 'hidden' if nobody sees the page, else a sentence. A page that is not
// seen holds no stream: browsers allow six connections to one place, and seven tabs would wait for each other.
async function follow(onFirst) {
  const abort = new AbortController();
  const unseen = () => { if (document.hidden) abort.abort(); };
  document.addEventListener('visibilitychange', unseen);
  let timer = setTimeout(() => abort.abort(), SILENCE_MS);
  const heard = () => { clearTimeout(timer); timer = setTimeout(() => abort.abort(), SILENCE_MS); };
  try {
    const response = await fetch('/api/v1/events', { headers: authorization(), signal: abort.signal, cache: 'no-store' });
    if (response.status === 401) return 'token';
    if (!response.ok) return 'The gateway refuses to be watched: ' + (await response.text()).trim().slice(0, 200);
    for await (const [name, value] of events(response.body, heard)) {
      if (name === 'history') points = value;
      if (name === 'state') { onFirst(); show(value); }
    }
    return 'The gateway has ended the stream.';
  } catch {
    return document.hidden ? 'hidden' : 'The gateway does not answer.';
  } finally {
    document.removeEventListener('visibilitychange', unseen);
    clearTimeout(timer);
    abort.abort();
  }
}

let wake = () => {};

function pause(seconds, each) {
  return new Promise((resolve) => {
    let left = seconds;
    each(left);
    const timer = setInterval(() => { left -= 1; if (left <= 0) wake(); else each(left); }, 1000);
    wake = () => { clearInterval(timer); resolve(); };
  });
}

function seen() {
  return new Promise((resolve) => {
    const look = () => {
      if (document.hidden) return;
      document.removeEventListener('visibilitychange', look);
      resolve();
    };
    document.addEventListener('visibilitychange', look);
    look();
  });
}

function login(isWrong) {
  byId('board').hidden = true;
  byId('login').hidden = false;
  byId('reload').hidden = true;
  write(byId('gateway-state'), 'locked');
  write(byId('gateway-facts'), '');
  const fault = byId('login-fault');
  write(fault, 'This is not the token.');
  fault.hidden = !isWrong;
  byId('token').focus();
  return new Promise((resolve) => { wake = resolve; });
}

byId('login-form').addEventListener('submit', (event) => {
  event.preventDefault();
  const given = byId('token').value.trim();
  byId('token').value = '';
  // What cannot stand in a header is no token; fetch() would throw over it.
  sessionStorage.setItem(TOKEN_KEY, /^[!-~]+$/.test(given) ? given : 'invalid');
  wake();
});

async function main() {
  let failures = 0;
  // Asking without a token where one is wanted would stand in the gateway's log as an attempt.
  if (document.documentElement.dataset.token === 'needed' && !token()) await login(false);
  for (;;) {
    await seen();
    const ended = await follow(() => {
      failures = 0;
      banner('');
      byId('login').hidden = true;
      byId('board').hidden = false;
      byId('reload').hidden = false;
    });
    if (ended === 'hidden') continue;
    if (ended === 'token') {
      banner('');
      const isWrong = Boolean(token());
      sessionStorage.removeItem(TOKEN_KEY);
      await login(isWrong);
      continue;
    }
    failures += 1;
    const wait = Math.min(LONGEST_WAIT_S, 2 ** (failures - 1));
    await pause(wait, (left) => banner(ended + ' What is shown is old.', left));
  }
}

main();
