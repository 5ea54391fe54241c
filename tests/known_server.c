/* A server of known timings for `make bench`: first token TTFT ms after the request reached this machine's kernel, then
 * one each ITL ms, 150 tokens or as many as max_tokens says.  In C, since one in Python reads a burst of requests slower
 * than a good client writes them.  cc -O2 -o known_server known_server.c; ./known_server PORT TTFT_MS ITL_MS
 *
 * GET /__log__ tells when each request came and each event was sent (CLOCK_MONOTONIC, seconds) in the simulator's keys;
 * POST /__reset__ forgets.  Linux only: epoll, and the kernel's own stamps of what arrives (SO_TIMESTAMPNS, socket(7)). */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { TOKENS = 4096, BODY = 1 << 16, MANY = 1 << 16 };

typedef struct {
  double received_s;
  int asked, events, over;
  double *sent_s, *due_s; /* [asked] */
} Request;

typedef struct {
  int fd, used;
  char in[BODY];
  Request *now; /* what it is answering */
} Connection;

/* Who is due when.  All waits of a kind are equally long, so what is put in last is due last. */
typedef struct {
  struct { double due_s; Connection *to; } item[MANY];
  unsigned first, end;
} Queue;

static Queue firsts, others;
static Request **requests;
static int known, room;
static double ttft_s, itl_s;

static double seconds(clockid_t clock) {
  struct timespec t;
  clock_gettime(clock, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static void put(Queue *queue, double due_s, Connection *to) {
  queue->item[queue->end % MANY].due_s = due_s;
  queue->item[queue->end++ % MANY].to = to;
}

static Queue *next_due(void) {
  int a = firsts.first != firsts.end, b = others.first != others.end;
  if (!a || !b) return a ? &firsts : b ? &others : NULL;
  return firsts.item[firsts.first % MANY].due_s <= others.item[others.first % MANY].due_s ? &firsts : &others;
}

/* A chunk of HTTP/1.1 (RFC 9112, 7.1) that holds one event. */
static char *chunk(char *to, const char *form, ...) {
  char event[1024];
  va_list values;
  va_start(values, form);
  int length = vsnprintf(event, sizeof event, form, values);
  va_end(values);
  return to + sprintf(to, "%x\r\ndata: %s\n\n\r\n", length + 8, event);
}

static void emit(Connection *c, double due_s) {
  Request *r = c->now;
  if (c->fd < 0) { /* the client has gone: no whole answer */
    r->events = 0;
    r->over = 1;
    free(c);
    return;
  }
  char out[4096], *end = out;
  int last = r->events + 1 == r->asked;
  if (!r->events)
    end += sprintf(end, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n");
  end = chunk(end, "{\"id\":\"known\",\"object\":\"text_completion\",\"created\":1,\"model\":\"simulated\",\"choices\":[{\"index\":0,"
              "\"text\":\" token\",\"logprobs\":null,\"finish_reason\":%s}],\"usage\":null}", last ? "\"length\"" : "null");
  if (last) {
    end = chunk(end, "{\"id\":\"known\",\"object\":\"text_completion\",\"created\":1,\"model\":\"simulated\",\"choices\":[],"
                "\"usage\":{\"prompt_tokens\":64,\"completion_tokens\":%d,\"total_tokens\":%d}}", r->asked, 64 + r->asked);
    end = chunk(end, "[DONE]");
    end += sprintf(end, "0\r\n\r\n");
  }
  r->due_s[r->events] = due_s;
  r->sent_s[r->events++] = seconds(CLOCK_MONOTONIC);
  if (write(c->fd, out, end - out) != end - out) r->events = 0; /* it does not read: no whole answer either */
  if (last || !r->events) c->now = NULL, r->over = 1;
  else put(&others, due_s + itl_s, c);
}

static void reply(int fd, const char *status, const char *body, size_t length) {
  dprintf(fd, "HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n", status, length);
  fcntl(fd, F_SETFL, 0); /* a log is long: wait until it is read */
  while (length) {
    ssize_t wrote = write(fd, body, length);
    if (wrote <= 0) break;
    body += wrote;
    length -= wrote;
  }
  fcntl(fd, F_SETFL, O_NONBLOCK);
}

static void reply_log(int fd) {
  char *body;
  size_t length;
  FILE *out = open_memstream(&body, &length);
  fprintf(out, "{\"requests\":[");
  for (int i = 0; i < known; i++) {
    Request *r = requests[i];
    fprintf(out, "%s{\"received_s\":%.7f,\"sent_s\":[", i ? "," : "", r->received_s);
    for (int k = 0; k < r->events; k++) fprintf(out, "%s%.7f", k ? "," : "", r->sent_s[k]);
    fprintf(out, "],\"late_s\":[");
    for (int k = 0; k < r->events; k++) fprintf(out, "%s%.7f", k ? "," : "", r->sent_s[k] - r->due_s[k]);
    fprintf(out, "]}");
  }
  fprintf(out, "]}");
  fclose(out);
  reply(fd, "200 OK", body, length);
  free(body);
}

static void reset(void) {
  for (int i = 0; i < known; i++) {
    if (!requests[i]->over) continue; /* still being answered: its queue knows it */
    free(requests[i]->sent_s);
    free(requests[i]->due_s);
    free(requests[i]);
  }
  known = 0;
}

static void begin(Connection *c, double received_s) {
  Request *r = calloc(1, sizeof *r);
  char *asked = strstr(c->in, "max_tokens\":");
  if (!asked) asked = strstr(c->in, "max_completion_tokens\":");
  r->received_s = received_s;
  r->asked = asked ? atoi(strchr(asked, ':') + 1) : 150;
  if (r->asked < 1 || r->asked > TOKENS) r->asked = TOKENS;
  r->sent_s = calloc(r->asked, sizeof(double));
  r->due_s = calloc(r->asked, sizeof(double));
  if (known == room) requests = realloc(requests, (room = 2 * room + 1024) * sizeof *requests);
  requests[known++] = c->now = r;
  put(&firsts, received_s + ttft_s, c);
}

static void answer(Connection *c, double received_s) {
  static const char models[] = "{\"object\":\"list\",\"data\":[{\"id\":\"simulated\",\"object\":\"model\",\"owned_by\":\"known\"}]}";
  if (!strncmp(c->in, "POST /v1/", 9) && strstr(c->in, "ompletions ")) begin(c, received_s);
  else if (!strncmp(c->in, "GET /v1/models", 14)) reply(c->fd, "200 OK", models, sizeof models - 1);
  else if (!strncmp(c->in, "GET /health", 11)) reply(c->fd, "200 OK", "{}", 2);
  else if (!strncmp(c->in, "GET /__log__", 12)) reply_log(c->fd);
  else if (!strncmp(c->in, "POST /__reset__", 15)) reset(), reply(c->fd, "200 OK", "{}", 2);
  else reply(c->fd, "404 Not Found", "{}", 2);
}

/* Read what came.  Returns 0 when the connection is over; `*stamp_s` is when the last of it reached the kernel. */
static int receive(Connection *c, double *stamp_s) {
  char control[256];
  struct iovec into = {c->in + c->used, sizeof c->in - 1 - c->used};
  struct msghdr message = {.msg_iov = &into, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
  ssize_t got = recvmsg(c->fd, &message, 0);
  if (got <= 0) return got < 0 && errno == EAGAIN;
  double now_s = seconds(CLOCK_MONOTONIC), wall_s = seconds(CLOCK_REALTIME);
  *stamp_s = now_s;
  for (struct cmsghdr *h = CMSG_FIRSTHDR(&message); h; h = CMSG_NXTHDR(&message, h))
    if (h->cmsg_level == SOL_SOCKET && h->cmsg_type == SCM_TIMESTAMPNS) {
      struct timespec t;
      memcpy(&t, CMSG_DATA(h), sizeof t);
      if (t.tv_sec) *stamp_s = now_s - (wall_s - (t.tv_sec + t.tv_nsec * 1e-9));
    }
  c->used += got;
  c->in[c->used] = 0;
  return 1;
}

static int whole(const Connection *c) {
  const char *body = strstr(c->in, "\r\n\r\n"), *length = strcasestr(c->in, "content-length:");
  return body && c->used >= body + 4 - c->in + (length && length < body ? atol(length + 15) : 0);
}

int main(int count, char **given) {
  int on = 1, poll = epoll_create1(0), listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(count > 1 ? atoi(given[1]) : 0),
                           .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t size = sizeof at;
  ttft_s = (count > 2 ? atof(given[2]) : 50) / 1e3;
  itl_s = (count > 3 ? atof(given[3]) : 10) / 1e3;
  signal(SIGPIPE, SIG_IGN); /* a client that has gone is seen by what write says */
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  setsockopt(listener, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on); /* what it accepts inherits it */
  if (bind(listener, (void *)&at, sizeof at) || listen(listener, 4096)) return perror("known_server"), 1;
  getsockname(listener, (void *)&at, &size);
  printf("known_server: http://127.0.0.1:%d\n", ntohs(at.sin_port));
  fflush(stdout);
  struct epoll_event event = {.events = EPOLLIN}, ready[256];
  epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event);
  for (;;) {
    Queue *next = next_due();
    double wait_s = next ? next->item[next->first % MANY].due_s - seconds(CLOCK_MONOTONIC) : 0;
    if (wait_s < 0) wait_s = 0;
    struct timespec wait = {(time_t)wait_s, (long)((wait_s - (time_t)wait_s) * 1e9)};
    int n = epoll_pwait2(poll, ready, 256, next ? &wait : NULL, NULL);
    for (int i = 0; i < n; i++) {
      Connection *c = ready[i].data.ptr;
      double stamp_s = 0;
      if (!c) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
        if (fd < 0) continue;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        c = calloc(1, sizeof *c);
        c->fd = fd;
        event.data.ptr = c;
        epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
      } else if (!receive(c, &stamp_s)) {
        close(c->fd);
        c->fd = -1;
        if (!c->now) free(c); /* else a queue knows it */
      } else if (c->used && !c->now && whole(c)) {
        answer(c, stamp_s);
        c->used = 0;
      }
    }
    while ((next = next_due()) && next->item[next->first % MANY].due_s <= seconds(CLOCK_MONOTONIC)) {
      unsigned at_item = next->first++ % MANY;
      emit(next->item[at_item].to, next->item[at_item].due_s);
    }
  }
}
