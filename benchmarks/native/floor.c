/* The floor: the least a WebSocket gateway over Redis pub/sub can do, in C, one thread, epoll.
 *
 * It has no tokens, positions, history, budgets or metrics. It reads Redis' messages by hand and
 * writes each payload as one text frame to every socket of its channel.
 *
 *   floor REDIS_PORT each|tick      prints its port; /ws/<channel> subscribes to <channel>
 *
 * each: one send per event. tick: one send per socket and read from Redis.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX_EVENTS = 512, REDIS_READ_BYTES = 1 << 18, REQUEST_BYTES = 4096, BUCKETS = 1 << 14 };

typedef struct Client {
  int fd;
  bool is_touched, waits;
  struct Client *next_in_channel, *next_touched;
  struct Channel *channel;
  uint8_t *out;
  size_t out_len, out_cap;
} Client;

typedef struct Channel {
  char *name;
  size_t length;
  Client *clients;
  struct Channel *next;
} Channel;

static Channel *buckets[BUCKETS];
static Client *touched;
static int epoll_fd, redis_fd, listen_fd;
static bool per_tick;
static uint8_t *redis_buf;
static size_t redis_len, redis_cap;

static void fail(const char *what) {
  fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
  exit(1);
}

static void *grow(void *memory, size_t size) {
  void *grown = realloc(memory, size);
  if (!grown) fail("memory");
  return grown;
}

/* --- SHA-1 (RFC 3174) and base64, for Sec-WebSocket-Accept --- */

static uint32_t rotate(uint32_t value, int by) { return value << by | value >> (32 - by); }

static void sha1_block(uint32_t state[5], const uint8_t *block) {
  uint32_t w[80];
  for (int i = 0; i < 16; i++)
    w[i] = (uint32_t)block[4 * i] << 24 | block[4 * i + 1] << 16 | block[4 * i + 2] << 8 |
           block[4 * i + 3];
  for (int i = 16; i < 80; i++) w[i] = rotate(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1);
  uint32_t a = state[0], b = state[1], c = state[2], d = state[3], e = state[4];
  for (int i = 0; i < 80; i++) {
    uint32_t f, k;
    if (i < 20) f = (b & c) | (~b & d), k = 0x5a827999;
    else if (i < 40) f = b ^ c ^ d, k = 0x6ed9eba1;
    else if (i < 60) f = (b & c) | (b & d) | (c & d), k = 0x8f1bbcdc;
    else f = b ^ c ^ d, k = 0xca62c1d6;
    uint32_t next = rotate(a, 5) + f + e + k + w[i];
    e = d, d = c, c = rotate(b, 30), b = a, a = next;
  }
  state[0] += a, state[1] += b, state[2] += c, state[3] += d, state[4] += e;
}

static void accept_key(const char *key, size_t key_length, char answer[29]) {
  uint8_t block[128] = {0};
  size_t length = key_length;
  memcpy(block, key, length);
  memcpy(block + length, "258EAFA5-E914-47DA-95CA-C5AB0DC85B11", 36);
  length += 36;
  block[length] = 0x80;
  size_t blocks = length + 9 > 64 ? 2 : 1;
  block[blocks * 64 - 2] = length * 8 >> 8;
  block[blocks * 64 - 1] = length * 8 & 0xff;
  uint32_t state[5] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0};
  for (size_t i = 0; i < blocks; i++) sha1_block(state, block + 64 * i);
  uint8_t digest[21] = {0};
  for (int i = 0; i < 20; i++) digest[i] = state[i / 4] >> (24 - 8 * (i % 4));
  static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  for (int i = 0; i < 7; i++) {
    uint32_t bits = digest[3 * i] << 16 | digest[3 * i + 1] << 8 | digest[3 * i + 2];
    for (int j = 0; j < 4; j++) answer[4 * i + j] = letters[bits >> (18 - 6 * j) & 63];
  }
  answer[27] = '=';
  answer[28] = 0;
}

/* --- Clients --- */

static void watch(int operation, int fd, uint32_t events, void *about) {
  struct epoll_event event = {.events = events, .data.ptr = about};
  if (epoll_ctl(epoll_fd, operation, fd, &event) < 0) fail("epoll_ctl");
}

static void drop(Client *client) {
  if (client->channel)
    for (Client **at = &client->channel->clients; *at; at = &(*at)->next_in_channel)
      if (*at == client) {
        *at = client->next_in_channel;
        break;
      }
  close(client->fd);
  client->fd = -1; /* kept: it may be on the list of touched ones; a few bytes for each client */
}

static void keep(Client *client, const void *data, size_t length) {
  if (client->out_len + length > client->out_cap) {
    client->out_cap = (client->out_len + length) * 2;
    client->out = grow(client->out, client->out_cap);
  }
  memcpy(client->out + client->out_len, data, length);
  client->out_len += length;
}

static void flush(Client *client) {
  if (client->fd < 0) return;
  ssize_t count = send(client->fd, client->out, client->out_len, MSG_NOSIGNAL | MSG_DONTWAIT);
  if (count < 0 && errno != EAGAIN) return;
  if (count > 0) {
    memmove(client->out, client->out + count, client->out_len - count);
    client->out_len -= count;
  }
  bool waits = client->out_len > 0;
  if (waits != client->waits)
    watch(EPOLL_CTL_MOD, client->fd, EPOLLIN | (waits ? EPOLLOUT : 0), client);
  client->waits = waits;
}

static void deliver(Client *client, const uint8_t *frame, size_t length) {
  if (per_tick || client->waits) {
    keep(client, frame, length);
    if (!client->is_touched) {
      client->is_touched = true;
      client->next_touched = touched;
      touched = client;
    }
    return;
  }
  ssize_t count = send(client->fd, frame, length, MSG_NOSIGNAL | MSG_DONTWAIT);
  if (count < 0) count = 0;
  if ((size_t)count < length) {
    keep(client, frame + count, length - count);
    flush(client);
  }
}

static void flush_touched(void) {
  while (touched) {
    Client *client = touched;
    touched = client->next_touched;
    client->is_touched = false;
    if (client->out_len) flush(client);
  }
}

static Channel *find_channel(const char *name, size_t length, bool is_made) {
  uint32_t hash = 2166136261u;
  for (size_t i = 0; i < length; i++) hash = (hash ^ (uint8_t)name[i]) * 16777619u;
  Channel **at = &buckets[hash % BUCKETS];
  for (; *at; at = &(*at)->next)
    if ((*at)->length == length && !memcmp((*at)->name, name, length)) return *at;
  if (!is_made) return NULL;
  Channel *channel = calloc(1, sizeof *channel);
  channel->name = strndup(name, length);
  channel->length = length;
  return *at = channel;
}

static void upgrade(Client *client) {
  char request[REQUEST_BYTES], answer[29], reply[256];
  ssize_t count = recv(client->fd, request, sizeof request - 1, 0);
  if (count <= 0) {
    drop(client);
    return;
  }
  request[count] = 0;
  char *key = strcasestr(request, "\r\nSec-WebSocket-Key: ");
  if (strncmp(request, "GET /ws/", 8) || !key || !strstr(request, "\r\n\r\n")) {
    drop(client);
    return;
  }
  key += 21;
  accept_key(key, strcspn(key, "\r"), answer);
  int length = sprintf(reply,
                       "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                       "Connection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n", answer);
  size_t name_length = strcspn(request + 8, " ");
  client->channel = find_channel(request + 8, name_length, true);
  if (!client->channel->clients) {
    char command[REQUEST_BYTES];
    int size = sprintf(command, "*2\r\n$9\r\nSUBSCRIBE\r\n$%zu\r\n%.*s\r\n", name_length,
                       (int)name_length, request + 8);
    if (send(redis_fd, command, size, MSG_NOSIGNAL) != size) fail("SUBSCRIBE");
  }
  client->next_in_channel = client->channel->clients;
  client->channel->clients = client;
  if (send(client->fd, reply, length, MSG_NOSIGNAL) != length) drop(client);
}

static void handle_client(Client *client, uint32_t events) {
  uint8_t ignored[4096];
  if (client->fd < 0) return;
  if (!client->channel) {
    upgrade(client);
    return;
  }
  if (events & EPOLLOUT) flush(client);
  if (events & ~EPOLLOUT && recv(client->fd, ignored, sizeof ignored, MSG_DONTWAIT) == 0)
    drop(client);
}

static void accept_clients(void) {
  int fd;
  while ((fd = accept4(listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    Client *client = calloc(1, sizeof *client);
    client->fd = fd;
    watch(EPOLL_CTL_ADD, fd, EPOLLIN, client);
  }
}

/* --- Redis --- */

/* Reads "$N\r\n...\r\n"; gives what lies behind it, or NULL where it is not complete. */
static const uint8_t *read_bulk(const uint8_t *at, const uint8_t *end, const uint8_t **data,
                                size_t *length) {
  const uint8_t *line = memchr(at, '\n', end - at);
  if (!line) return NULL;
  *length = strtoul((const char *)at + 1, NULL, 10);
  *data = line + 1;
  return *data + *length + 2 <= end ? *data + *length + 2 : NULL;
}

static void publish(const uint8_t *name, size_t name_length, const uint8_t *data, size_t length) {
  static uint8_t frame[1 << 17];
  Channel *channel = find_channel((const char *)name, name_length, false);
  if (!channel || length > (1 << 16) - 1) return;
  size_t head = 2;
  frame[0] = 0x81;
  frame[1] = length;
  if (length > 125) {
    frame[1] = 126;
    frame[2] = length >> 8;
    frame[3] = length & 0xff;
    head = 4;
  }
  memcpy(frame + head, data, length);
  for (Client *client = channel->clients; client; client = client->next_in_channel)
    deliver(client, frame, head + length);
}

static void read_redis(void) {
  if (redis_cap - redis_len < REDIS_READ_BYTES + 1) {
    redis_cap = redis_len + 2 * REDIS_READ_BYTES;
    redis_buf = grow(redis_buf, redis_cap);
  }
  ssize_t count = recv(redis_fd, redis_buf + redis_len, REDIS_READ_BYTES, 0);
  if (count <= 0) fail("Redis");
  redis_len += count;
  redis_buf[redis_len] = 0;
  const uint8_t *at = redis_buf, *end = redis_buf + redis_len;
  while (at < end) {
    /* *3, then kind and channel; then a payload, or the number of subscriptions. */
    const uint8_t *kind, *name, *data, *next = memchr(at, '\n', end - at);
    size_t kind_length, name_length, length;
    if (!next || !(next = read_bulk(next + 1, end, &kind, &kind_length)) ||
        !(next = read_bulk(next, end, &name, &name_length)))
      break;
    if (kind_length == 7) {
      if (!(next = read_bulk(next, end, &data, &length))) break;
      publish(name, name_length, data, length);
    } else {
      const uint8_t *line = memchr(next, '\n', end - next);
      if (!line) break;
      next = line + 1;
    }
    at = next;
  }
  redis_len = end - at;
  memmove(redis_buf, at, redis_len);
  flush_touched();
}

static int loopback_socket(int port, bool is_server) {
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | (is_server ? SOCK_NONBLOCK : 0), 0);
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  if (fd < 0) fail("socket");
  if (!is_server) {
    if (connect(fd, (void *)&address, size) < 0) fail("connect to Redis");
    return fd;
  }
  if (bind(fd, (void *)&address, size) < 0 || listen(fd, 2048) < 0) fail("listen");
  getsockname(fd, (void *)&address, &size);
  printf("%d\n", ntohs(address.sin_port));
  fflush(stdout);
  return fd;
}

int main(int argc, char **argv) {
  if (argc != 3) {
    fputs("usage: floor REDIS_PORT each|tick\n", stderr);
    return 2;
  }
  per_tick = !strcmp(argv[2], "tick");
  epoll_fd = epoll_create1(EPOLL_CLOEXEC);
  redis_fd = loopback_socket(atoi(argv[1]), false);
  listen_fd = loopback_socket(0, true);
  watch(EPOLL_CTL_ADD, redis_fd, EPOLLIN, &redis_fd);
  watch(EPOLL_CTL_ADD, listen_fd, EPOLLIN, &listen_fd);
  static struct epoll_event events[MAX_EVENTS];
  for (;;) {
    int count = epoll_wait(epoll_fd, events, MAX_EVENTS, -1);
    for (int i = 0; i < count; i++) {
      void *about = events[i].data.ptr;
      if (about == &redis_fd) read_redis();
      else if (about == &listen_fd) accept_clients();
      else handle_client(about, events[i].events);
    }
  }
}
