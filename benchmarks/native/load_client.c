/* Load generator: holds WebSocket connections, counts what arrives on them by the marks in the
 * payloads, and publishes to Redis at a rate or with a bounded number of events in flight.
 *
 * One process, one thread, epoll. Loopback only. `load_client.py` is the same program in Python.
 *
 *   load_client CONNECTIONS      lines of: user \t port \t path \t subprotocols or -
 *
 * Commands on stdin, one JSON line on stdout for each:
 *   connect CONCURRENCY ESTABLISHED   open all; ESTABLISHED 1: wait for connection_established
 *   redis PORT FEEDS                  connect to Redis; FEEDS has a line per user, see read_feeds
 *   reset                             begin a new count
 *   flow MS WINDOW BURST BATCHED      publish bursts, at most WINDOW of them unanswered
 *   pace MS RATE BURST BATCHED        publish RATE events a second, whatever comes back
 *   trickle RATE                      publish singly at a rate, until the next line comes
 *   probe INTERVAL_MS                 ping on the first connection, until the next line comes
 *   write COUNT BURST                 write so many events for every feed; nobody is to get them
 *   collect EXPECTED TIMEOUT_MS       wait until so many events have arrived
 *   quit
 *
 * The mark: bench:<user>:<number>:<CLOCK_MONOTONIC ns>; with numbers from 0 for each user.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum {
  READ_BYTES = 1 << 18,
  MAX_EVENTS = 1024,
  QUIET_MS = 5000,
  MAX_BURST = 15, /* the longest array that msgpack's shortest form holds */
  EVENT_BYTES = 1 << 16
};

typedef struct {
  int fd, user;
  enum { CLOSED, CONNECTING, UPGRADING, ESTABLISHING, OPEN } state;
  uint64_t next;
  uint8_t *rest; /* the incomplete frame at the end of the last read */
  size_t rest_len;
  char *request;
  int port;
} Connection;

typedef struct {
  bool is_relay;
  char *live, *hash, *log, *epoch, *run, *prefix, *suffix;
  uint64_t offset, seq, number;
  int connections;
} Feed;

static Connection *connections;
static int connection_count, epoll_fd, timer_fd, redis_fd = -1;
static Feed *feeds;
static int feed_count, next_feed;
static uint8_t *inbuf;
static char *out;
static size_t out_len, out_cap, out_sent;
static char reply_tail;

static uint32_t *samples;
static size_t sample_count, sample_cap;
static uint64_t published, expected, received, missing, repeated, foreign, resets, closed_count;
static uint64_t first_ns, last_ns;
static int opened, opening, next_to_open;
static bool wants_established, is_told;
static int redis_tag, timer_tag, stdin_tag;

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

static void fail(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("load_client: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  exit(1);
}

static void *grow(void *memory, size_t size) {
  void *grown = realloc(memory, size);
  if (!grown) fail("out of memory");
  return grown;
}

static int connect_to(int port, bool is_blocking) {
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | (is_blocking ? 0 : SOCK_NONBLOCK), 0);
  if (fd < 0) fail("socket: %s", strerror(errno));
  int one = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(fd, (void *)&address, sizeof address) < 0 && errno != EINPROGRESS)
    fail("connect to port %d: %s", port, strerror(errno));
  return fd;
}

/* --- Connections --- */

static void close_connection(Connection *c) {
  if (c->state == CLOSED) return;
  if (c->state != OPEN) fail("user %d: closed during the handshake", c->user);
  close(c->fd);
  c->state = CLOSED;
  closed_count++;
}

static void open_next(void) {
  Connection *c = &connections[next_to_open++];
  c->fd = connect_to(c->port, false);
  c->state = CONNECTING;
  struct epoll_event event = {.events = EPOLLOUT, .data.ptr = c};
  if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event) < 0) fail("epoll_ctl: %s", strerror(errno));
  opening++;
}

static void is_open(Connection *c) {
  c->state = OPEN;
  opened++;
  opening--;
}

static void add_sample(uint64_t sent_ns, uint64_t at_ns) {
  if (sample_count == sample_cap) {
    sample_cap = sample_cap ? sample_cap * 2 : 1 << 16;
    samples = grow(samples, sample_cap * sizeof *samples);
  }
  samples[sample_count++] = at_ns > sent_ns ? (at_ns - sent_ns) / 1000 : 0;
}

static void receive_event(Connection *c, const char *mark, uint64_t at_ns) {
  char *end;
  unsigned long user = strtoul(mark + 6, &end, 10);
  uint64_t number = strtoull(end + 1, &end, 10);
  uint64_t sent_ns = strtoull(end + 1, &end, 10);
  if (*end != ';') fail("user %d: a mark that cannot be read", c->user);
  received++;
  last_ns = at_ns;
  if ((int)user != c->user) {
    foreign++;
    return;
  }
  if (number < c->next) {
    repeated++;
  } else {
    missing += number - c->next;
    c->next = number + 1;
  }
  add_sample(sent_ns, at_ns);
}

static void send_pong(Connection *c, const uint8_t *payload, size_t length) {
  uint8_t frame[2 + 4 + 125] = {0x8a, 0x80 | length};
  memcpy(frame + 6, payload, length); /* the masking key is zero */
  if (send(c->fd, frame, 6 + length, MSG_NOSIGNAL) < 0 && errno != EAGAIN) close_connection(c);
}

static void receive_pong(const uint8_t *payload, size_t length, uint64_t at_ns) {
  uint64_t sent_ns;
  if (length != sizeof sent_ns) fail("a pong that answers no ping of ours");
  memcpy(&sent_ns, payload, length);
  received++;
  last_ns = at_ns;
  add_sample(sent_ns, at_ns);
}

static void receive_frame(Connection *c, int opcode, const uint8_t *payload, size_t length,
                          uint64_t at_ns) {
  if (opcode == 10) {
    receive_pong(payload, length, at_ns);
  } else if (opcode == 9) {
    send_pong(c, payload, length);
  } else if (opcode == 8) {
    close_connection(c);
  } else if (opcode <= 2) {
    /* An event_part or a joined batch would hold several; ours are one a frame. */
    const char *mark = memmem(payload, length, "bench:", 6);
    if (mark) {
      receive_event(c, mark, at_ns);
    } else if (c->state == ESTABLISHING && memmem(payload, length, "connection_established", 22)) {
      is_open(c);
    } else if (memmem(payload, length, "\"type\":\"reset\"", 14)) {
      resets++;
    }
  }
}

static size_t parse(Connection *c, const uint8_t *data, size_t length, uint64_t at_ns) {
  size_t used = 0;
  if (c->state == UPGRADING) {
    const char *end = memmem(data, length, "\r\n\r\n", 4);
    if (!end) return 0;
    if (length < 12 || memcmp(data + 9, "101", 3))
      fail("user %d: refused: %.*s", c->user, (int)strcspn((const char *)data, "\r"), data);
    used = (const uint8_t *)end + 4 - data;
    free(c->request);
    c->request = NULL;
    c->state = ESTABLISHING;
    if (!wants_established) is_open(c);
  }
  while (length - used >= 2 && c->state != CLOSED) {
    const uint8_t *frame = data + used;
    size_t head = 2, size = frame[1] & 0x7f;
    if (size == 126) {
      if (length - used < 4) break;
      size = frame[2] << 8 | frame[3];
      head = 4;
    } else if (size == 127) {
      if (length - used < 10) break;
      size = 0;
      for (int i = 2; i < 10; i++) size = size << 8 | frame[i];
      head = 10;
    }
    if (length - used < head + size) break;
    receive_frame(c, frame[0] & 0x0f, frame + head, size, at_ns);
    used += head + size;
  }
  return used;
}

static void read_connection(Connection *c) {
  size_t kept = c->rest_len;
  if (kept > READ_BYTES) fail("user %d: a frame over %d bytes", c->user, READ_BYTES);
  memcpy(inbuf, c->rest, kept);
  ssize_t count = recv(c->fd, inbuf + kept, READ_BYTES, 0);
  if (count < 0 && errno == EAGAIN) return;
  if (count <= 0) {
    close_connection(c);
    return;
  }
  inbuf[kept + count] = 0;
  size_t used = parse(c, inbuf, kept + count, now_ns());
  if (c->state == CLOSED) return;
  c->rest_len = kept + count - used;
  if (c->rest_len) {
    c->rest = grow(c->rest, c->rest_len);
    memcpy(c->rest, inbuf + used, c->rest_len);
  } else if (c->rest) {
    free(c->rest);
    c->rest = NULL;
  }
}

static void handle_connection(Connection *c) {
  if (c->state != CONNECTING) {
    read_connection(c);
    return;
  }
  int error = 0;
  socklen_t size = sizeof error;
  getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
  if (error) fail("connect to port %d: %s", c->port, strerror(error));
  size_t length = strlen(c->request);
  if (send(c->fd, c->request, length, MSG_NOSIGNAL) != (ssize_t)length)
    fail("a handshake was not written: %s", strerror(errno));
  c->state = UPGRADING;
  struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
  epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event);
}

/* --- Publishing --- */

static void put(const void *data, size_t length) {
  if (out_len + length > out_cap) {
    out_cap = (out_len + length) * 2;
    out = grow(out, out_cap);
  }
  memcpy(out + out_len, data, length);
  out_len += length;
}

static void put_text(const char *text) { put(text, strlen(text)); }

static void put_bulk(const char *data, size_t length) {
  char head[32];
  put(head, sprintf(head, "$%zu\r\n", length));
  put(data, length);
  put("\r\n", 2);
}

static size_t pack_string(uint8_t *to, const char *text, size_t length) {
  size_t head;
  if (length < 32) {
    to[0] = 0xa0 | length;
    head = 1;
  } else {
    to[0] = 0xda;
    to[1] = length >> 8;
    to[2] = length & 0xff;
    head = 3;
  }
  memcpy(to + head, text, length);
  return head + length;
}

static size_t pack_number(uint8_t *to, uint64_t number) {
  to[0] = 0xce;
  for (int i = 0; i < 4; i++) to[1 + i] = number >> (24 - 8 * i);
  return 5;
}

static size_t write_event(Feed *feed, char *to, uint64_t at_ns) {
  return sprintf(to, "%sbench:%d:%llu:%llu;%s", feed->prefix, (int)(feed - feeds),
                 (unsigned long long)feed->number++, (unsigned long long)at_ns, feed->suffix);
}

/* One array is what publish.lua sends: msgpack [1, epoch, [[offset, seq, kind, run, event], ...]]. */
static size_t pack_head(Feed *feed, int count, uint8_t *to) {
  size_t length = 0;
  to[length++] = 0x93;
  to[length++] = 1;
  length += pack_string(to + length, feed->epoch, strlen(feed->epoch));
  to[length++] = 0x90 | count;
  return length;
}

static size_t pack_entry(Feed *feed, const char *event, size_t event_length, uint8_t *to) {
  size_t length = 0;
  to[length++] = 0x95;
  length += pack_number(to + length, feed->offset);
  length += pack_number(to + length, feed->seq);
  to[length++] = 0;
  length += pack_string(to + length, feed->run, strlen(feed->run));
  return length + pack_string(to + length, event, event_length);
}

static void put_publish(Feed *feed, const void *message, size_t length) {
  put_text("*3\r\n$7\r\nPUBLISH\r\n");
  put_bulk(feed->live, strlen(feed->live));
  put_bulk(message, length);
}

/* The channel's offset moves before anything is published, so that position checks stay true. */
static void put_offset(Feed *feed, int count) {
  char number[24];
  put_text("*4\r\n$7\r\nHINCRBY\r\n");
  put_bulk(feed->hash, strlen(feed->hash));
  put_text("$6\r\noffset\r\n");
  put_bulk(number, sprintf(number, "%d", count));
}

/* A gateway that has fallen behind reads the log. */
static void put_log(Feed *feed, const char *event, size_t length) {
  char text[32];
  put_text("*12\r\n$4\r\nXADD\r\n");
  put_bulk(feed->log, strlen(feed->log));
  put_text("$6\r\nMAXLEN\r\n$1\r\n~\r\n$3\r\n256\r\n");
  put_bulk(text, sprintf(text, "%llu-0", (unsigned long long)feed->offset));
  put_text("$1\r\ne\r\n");
  put_bulk(event, length);
  put_text("$1\r\ns\r\n");
  put_bulk(text, sprintf(text, "%llu", (unsigned long long)feed->seq));
  put_text("$1\r\nr\r\n");
  put_bulk(feed->run, strlen(feed->run));
}

static void publish_burst(int burst, bool is_batched, uint64_t at_ns) {
  static char events[MAX_BURST][EVENT_BYTES];
  static uint8_t message[MAX_BURST * (EVENT_BYTES + 256)];
  size_t lengths[MAX_BURST], packed = 0;
  Feed *feed = &feeds[next_feed];
  next_feed = (next_feed + 1) % feed_count;
  uint64_t offset = feed->offset, seq = feed->seq;
  put_offset(feed, burst);
  for (int i = 0; i < burst; i++) {
    feed->offset++, feed->seq++;
    lengths[i] = write_event(feed, events[i], at_ns);
    put_log(feed, events[i], lengths[i]);
  }
  feed->offset = offset, feed->seq = seq;
  if (feed->is_relay && is_batched) packed = pack_head(feed, burst, message);
  for (int i = 0; i < burst; i++) {
    feed->offset++, feed->seq++;
    if (!feed->is_relay) {
      put_publish(feed, events[i], lengths[i]);
    } else {
      if (!is_batched) packed = pack_head(feed, 1, message);
      packed += pack_entry(feed, events[i], lengths[i], message + packed);
      if (!is_batched) put_publish(feed, message, packed);
    }
  }
  if (feed->is_relay && is_batched) put_publish(feed, message, packed);
  published += burst;
  expected += (uint64_t)burst * feed->connections;
}

static void set_redis_interest(bool wants_write) {
  static bool has_write;
  if (wants_write == has_write) return;
  has_write = wants_write;
  struct epoll_event event = {.events = EPOLLIN | (wants_write ? EPOLLOUT : 0),
                              .data.ptr = &redis_tag};
  epoll_ctl(epoll_fd, EPOLL_CTL_MOD, redis_fd, &event);
}

static void flush_redis(void) {
  while (out_sent < out_len) {
    ssize_t count = send(redis_fd, out + out_sent, out_len - out_sent, MSG_NOSIGNAL);
    if (count < 0) {
      if (errno != EAGAIN) fail("Redis: %s", strerror(errno));
      set_redis_interest(true);
      return;
    }
    out_sent += count;
  }
  out_len = out_sent = 0;
  set_redis_interest(false);
}

static void read_redis(void) {
  ssize_t count = recv(redis_fd, inbuf, READ_BYTES, 0);
  if (count == 0) fail("Redis closed the connection");
  if (count < 0) return;
  for (ssize_t i = 0; i < count; i++) {
    if (inbuf[i] == '-' && reply_tail == '\n')
      fail("Redis: %.*s", (int)(count - i > 200 ? 200 : count - i), inbuf + i);
    reply_tail = inbuf[i];
  }
}

static char *field(char **line) {
  char *value = strsep(line, "\t\n");
  if (!value) fail("a field is missing");
  return strdup(value);
}

static FILE *open_file(const char *path) {
  FILE *file = fopen(path, "r");
  if (!file) fail("%s: %s", path, strerror(errno));
  return file;
}

/* relay|plain \t live channel \t channel hash \t log \t epoch \t offset \t seq \t run \t prefix
 * \t suffix, with the mark between the last two. plain: the event itself is published. */
static void read_feeds(const char *path) {
  FILE *file = open_file(path);
  char *line = NULL;
  size_t size = 0;
  while (getline(&line, &size, file) > 0) {
    feeds = grow(feeds, (feed_count + 1) * sizeof *feeds);
    Feed *feed = &feeds[feed_count++];
    memset(feed, 0, sizeof *feed);
    char *rest = line, *kind = field(&rest);
    feed->is_relay = !strcmp(kind, "relay");
    feed->live = field(&rest);
    feed->hash = field(&rest);
    feed->log = field(&rest);
    feed->epoch = field(&rest);
    feed->offset = strtoull(field(&rest), NULL, 10);
    feed->seq = strtoull(field(&rest), NULL, 10);
    feed->run = field(&rest);
    feed->prefix = field(&rest);
    feed->suffix = field(&rest);
    if (strlen(feed->prefix) + strlen(feed->suffix) > EVENT_BYTES - 100) fail("too long an event");
    free(kind);
  }
  free(line);
  fclose(file);
  for (int i = 0; i < connection_count; i++)
    if (connections[i].user < feed_count) feeds[connections[i].user].connections++;
}

/* --- The loop --- */

static void turn(int timeout_ms) {
  static struct epoll_event events[MAX_EVENTS];
  int count = epoll_wait(epoll_fd, events, MAX_EVENTS, timeout_ms);
  for (int i = 0; i < count; i++) {
    void *about = events[i].data.ptr;
    if (about == &redis_tag) {
      if (events[i].events & EPOLLOUT) flush_redis();
      if (events[i].events & EPOLLIN) read_redis();
    } else if (about == &timer_tag) {
      uint64_t expirations;
      if (read(timer_fd, &expirations, sizeof expirations) < 0 && errno != EAGAIN) fail("timer");
    } else if (about == &stdin_tag) {
      is_told = true;
    } else {
      handle_connection(about);
    }
  }
}

static void watch_stdin(bool is_watched) {
  struct epoll_event event = {.events = is_watched ? EPOLLIN : 0, .data.ptr = &stdin_tag};
  epoll_ctl(epoll_fd, EPOLL_CTL_MOD, 0, &event);
}

static int compare(const void *left, const void *right) {
  uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
  return (a > b) - (a < b);
}

static uint32_t percentile(double share) {
  if (!sample_count) return 0;
  size_t index = (size_t)(share * sample_count);
  return samples[index < sample_count ? index : sample_count - 1];
}

static double cpu_s(void) {
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_utime.tv_sec + usage.ru_stime.tv_sec +
         (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

static void print_count(void) {
  qsort(samples, sample_count, sizeof *samples, compare);
  double elapsed_s = last_ns > first_ns ? (last_ns - first_ns) / 1e9 : 0;
  printf("{\"published\":%llu,\"expected\":%llu,\"received\":%llu,\"missing\":%llu,"
         "\"repeated\":%llu,\"foreign\":%llu,\"resets\":%llu,\"closed\":%llu,"
         "\"elapsed_s\":%.6f,\"cpu_s\":%.3f,\"samples\":%zu,\"p50_us\":%u,\"p99_us\":%u,"
         "\"p999_us\":%u,\"max_us\":%u}\n",
         (unsigned long long)published, (unsigned long long)expected,
         (unsigned long long)received, (unsigned long long)missing,
         (unsigned long long)repeated, (unsigned long long)foreign, (unsigned long long)resets,
         (unsigned long long)closed_count, elapsed_s, cpu_s(), sample_count, percentile(0.5),
         percentile(0.99), percentile(0.999), percentile(1));
}

static void begin_count(void) {
  published = expected = received = missing = repeated = foreign = resets = closed_count = 0;
  sample_count = 0;
  first_ns = last_ns = now_ns();
  for (int i = 0; i < connection_count; i++) connections[i].next = 0;
  for (int i = 0; i < feed_count; i++) feeds[i].number = 0;
}

static void finish_count(void) {
  uint64_t seen = received, quiet_since_ns = now_ns();
  while (received < expected && now_ns() - quiet_since_ns < QUIET_MS * 1000000ull) {
    flush_redis();
    turn(50);
    if (received != seen) {
      seen = received;
      quiet_since_ns = now_ns();
    }
  }
  print_count();
}

static void flow(long duration_ms, long window, int burst, bool is_batched) {
  begin_count();
  uint64_t end_ns = first_ns + duration_ms * 1000000ull;
  while (now_ns() < end_ns) {
    uint64_t at_ns = now_ns();
    while (expected - received < (uint64_t)window * burst) publish_burst(burst, is_batched, at_ns);
    flush_redis();
    turn(50);
  }
  finish_count();
}

/* Wakes turn() at a time; epoll's own timeout has milliseconds only. */
static void turn_until(double due_ns) {
  uint64_t at_ns = due_ns;
  struct itimerspec at = {.it_value = {at_ns / 1000000000u, at_ns % 1000000000u}};
  timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &at, NULL);
  turn(50);
}

/* Latency counts from when an event was due: a generator that lags must not hide it. */
static void pace_until(uint64_t end_ns, double rate, int burst, bool is_batched) {
  double interval_ns = 1e9 * burst / rate, due_ns = first_ns;
  while (due_ns < end_ns && !is_told) {
    for (uint64_t at_ns = now_ns(); due_ns <= at_ns && due_ns < end_ns; due_ns += interval_ns)
      publish_burst(burst, is_batched, (uint64_t)due_ns);
    flush_redis();
    turn_until(due_ns);
  }
}

static void pace(long duration_ms, double rate, int burst, bool is_batched) {
  begin_count();
  pace_until(first_ns + duration_ms * 1000000ull, rate, burst, is_batched);
  finish_count();
}

static bool read_command(char *line, size_t size) {
  /* Unbuffered, so that epoll sees every command; they are few. */
  size_t length = 0;
  while (length + 1 < size) {
    ssize_t count = read(0, line + length, 1);
    if (count <= 0) return false;
    if (line[length] == '\n') break;
    length++;
  }
  line[length] = 0;
  return true;
}

static void begin_until_told(void) {
  begin_count();
  is_told = false;
  watch_stdin(true);
}

static void finish_told(void) {
  char line[16];
  watch_stdin(false);
  is_told = false;
  if (read_command(line, sizeof line)) finish_count();
}

static void trickle(double rate) {
  begin_until_told();
  pace_until(UINT64_MAX, rate, 1, false);
  finish_told();
}

static void send_ping(Connection *c, uint64_t due_ns) {
  uint8_t frame[2 + 4 + sizeof due_ns] = {0x89, 0x80 | sizeof due_ns};
  memcpy(frame + 6, &due_ns, sizeof due_ns); /* the masking key is zero */
  if (send(c->fd, frame, sizeof frame, MSG_NOSIGNAL) != sizeof frame)
    fail("a ping was not written: %s", strerror(errno));
  published++, expected++;
}

static void probe(double interval_ms) {
  begin_until_told();
  double due_ns = first_ns;
  while (!is_told) {
    /* In turn, because a gateway closes a connection that pings too often. */
    for (uint64_t at_ns = now_ns(); due_ns <= at_ns; due_ns += interval_ms * 1e6)
      send_ping(&connections[published % connection_count], (uint64_t)due_ns);
    turn_until(due_ns);
  }
  finish_told();
}

static void write_events(int count, int burst) {
  for (int done = 0; done < count; done += burst) {
    for (int i = 0; i < feed_count; i++) publish_burst(burst, true, now_ns());
    for (flush_redis(); out_len; flush_redis()) turn(50);
  }
  printf("{\"written\":%d}\n", count * feed_count);
}

static void collect(uint64_t count, long timeout_ms) {
  uint64_t deadline_ns = now_ns() + timeout_ms * 1000000ull;
  expected = count;
  while (received < expected && now_ns() < deadline_ns) turn(50);
  print_count();
}

static void open_all(int concurrency, bool until_established) {
  wants_established = until_established;
  uint64_t since_ns = now_ns();
  while (opened < connection_count) {
    while (opening < concurrency && next_to_open < connection_count) open_next();
    turn(1000);
    if (now_ns() - since_ns > 240 * 1000000000ull) fail("connected only %d", opened);
  }
  printf("{\"connected\":%d,\"elapsed_s\":%.6f}\n", opened, (now_ns() - since_ns) / 1e9);
}

static void read_connections(const char *path) {
  FILE *file = open_file(path);
  char *line = NULL;
  size_t size = 0;
  while (getline(&line, &size, file) > 0) {
    connections = grow(connections, (connection_count + 1) * sizeof *connections);
    Connection *c = &connections[connection_count++];
    memset(c, 0, sizeof *c);
    char *rest = line;
    char *user = field(&rest), *port = field(&rest), *target = field(&rest), *offer = field(&rest);
    c->user = atoi(user);
    c->port = atoi(port);
    bool has_offer = strcmp(offer, "-") != 0;
    if (asprintf(&c->request,
                 "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%s\r\nUpgrade: websocket\r\n"
                 "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n%s%s%s\r\n",
                 target, port, has_offer ? "Sec-WebSocket-Protocol: " : "",
                 has_offer ? offer : "", has_offer ? "\r\n" : "") < 0)
      fail("out of memory");
    free(user), free(port), free(target), free(offer);
  }
  free(line);
  fclose(file);
}

static void idle_until_command(void) {
  /* Pings must be answered while nothing is measured. */
  for (is_told = false; !is_told;) turn(1000);
  is_told = false;
}

int main(int argc, char **argv) {
  if (argc != 2) fail("usage: load_client CONNECTIONS");
  setvbuf(stdout, NULL, _IOLBF, 0);
  inbuf = grow(NULL, 2 * READ_BYTES + 1);
  epoll_fd = epoll_create1(EPOLL_CLOEXEC);
  timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
  struct epoll_event event = {.events = EPOLLIN, .data.ptr = &timer_tag};
  epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &event);
  event.data.ptr = &stdin_tag;
  if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, 0, &event) < 0) fail("stdin must be a pipe");
  read_connections(argv[1]);
  char line[4096];
  for (;;) {
    watch_stdin(true);
    idle_until_command();
    watch_stdin(false);
    if (!read_command(line, sizeof line)) return 0;
    char path[2048];
    long a, b;
    int burst, flag;
    double rate;
    uint64_t count;
    if (sscanf(line, "connect %ld %d", &a, &flag) == 2) {
      open_all(a, flag);
    } else if (sscanf(line, "redis %ld %2047s", &a, path) == 2) {
      read_feeds(path);
      redis_fd = connect_to(a, true);
      fcntl(redis_fd, F_SETFL, O_NONBLOCK);
      event.data.ptr = &redis_tag;
      epoll_ctl(epoll_fd, EPOLL_CTL_ADD, redis_fd, &event);
      printf("{\"feeds\":%d}\n", feed_count);
    } else if (sscanf(line, "flow %ld %ld %d %d", &a, &b, &burst, &flag) == 4) {
      if (redis_fd < 0 || burst > MAX_BURST) fail("flow without redis, or too long a burst");
      flow(a, b, burst, flag);
    } else if (sscanf(line, "pace %ld %lf %d %d", &a, &rate, &burst, &flag) == 4) {
      if (redis_fd < 0 || burst > MAX_BURST) fail("pace without redis, or too long a burst");
      pace(a, rate, burst, flag);
    } else if (sscanf(line, "trickle %lf", &rate) == 1) {
      if (redis_fd < 0) fail("trickle without redis");
      trickle(rate);
    } else if (sscanf(line, "probe %lf", &rate) == 1) {
      probe(rate);
    } else if (sscanf(line, "write %ld %d", &a, &burst) == 2) {
      if (redis_fd < 0 || burst > MAX_BURST || a % burst) fail("write without redis, or unevenly");
      write_events(a, burst);
    } else if (sscanf(line, "collect %lu %ld", &count, &a) == 2) {
      collect(count, a);
    } else if (!strcmp(line, "reset")) {
      begin_count();
      puts("{\"reset\":true}");
    } else if (!strcmp(line, "quit")) {
      return 0;
    } else {
      fail("unknown command: %s", line);
    }
  }
}
