"""The stand-in's REST interface: addresses, status and metadata as JSON, errors as HTTP statuses."""

import http.server
import json
import re
import urllib.parse

from google.protobuf import json_format

from tests.serving import stand_in_json
from tests.serving.c_api import INVALID_ARGUMENT, CError

_HTTP_STATUS = {3: 400, 4: 504, 5: 404, 7: 403, 8: 429, 9: 400, 11: 400, 12: 501, 14: 503}
_PREDICT = re.compile(r"/v1/models/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?:predict")
_ABOUT = re.compile(r"/v1/models/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?(/metadata)?")


class RESTHandler(http.server.BaseHTTPRequestHandler):
    """A subclass sets `core`, the StandIn."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        self._answer(_ABOUT, self._about)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(_PREDICT, lambda *which: self._predict(body, *which))

    def log_message(self, *_):
        pass

    def _answer(self, pattern, function):
        try:
            match = pattern.fullmatch(self.path)
            if match is None:
                raise CError(INVALID_ARGUMENT, f"Malformed request: {self.command} {self.path}")
            model, version, label, *rest = (part and urllib.parse.unquote(part) for part in match.groups())
            status, text = 200, function(model, version and int(version), label, *rest)
        except CError as e:
            status, text = _HTTP_STATUS.get(e.code, 500), json.dumps({"error": str(e)})
        except stand_in_json.RequestError as e:
            status, text = 400, json.dumps({"error": str(e)})
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _about(self, model, version, label, metadata):
        if not metadata:
            return _to_json(self.core.status(model, version, label))
        answer, signatures = self.core.metadata(model, version, label)
        spec = _to_json(answer.model_spec)
        return f'{{"model_spec": {spec}, "metadata": {{"signature_def": {_to_json(signatures)}}}}}'

    def _predict(self, text, model, version, label):
        self.core.count()
        _, servable = self.core.find(model, version, label)
        body, signature = stand_in_json.parse(text)
        if signature not in servable.inputs:
            servable.run(signature, {}, INVALID_ARGUMENT)
        is_row, inputs = stand_in_json.decode(body, servable.inputs[signature])
        return stand_in_json.encode(is_row, self.core.timed(servable.run, signature, inputs))


def _to_json(message):
    return json_format.MessageToJson(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
