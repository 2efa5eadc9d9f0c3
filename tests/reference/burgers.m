function burgers(task)
% BURGERS  Reference solutions of a discrete Burgers optimal control problem.
%
%   burgers             solve every case below and write burgers_<case>.mat
%                       and burgers.csv into the current folder
%   burgers published   reproduce optima found in the literature
%
% On (0,1) x (0,T), find the control z for which the solution u of
%
%     u_t + c (u^2)_x - nu u_xx = z,    u = 0 at x = 0, 1,    u(.,0) = u_0
%
% stays close to d, alpha being the price of control.  Discretized by P1
% elements in space (width h) and the theta scheme in time (step tau = T/N),
% the problem is to minimize
%
%     J = sum_{i=0..N} w_i/2 |u_i - d|_M^2  +  alpha/2 size(z)^2
%
% with trapezoidal weights w = tau (1/2, 1, ..., 1, 1/2), subject to
%
%     F_k = M (u_k - u_{k-1}) + tau [th S(u_k) + (1-th) S(u_{k-1})]
%                             - tau B (z of step k)  =  0,      k = 1..N,
%
% where S(u) = nu A u + c N(u).  The control lives on all nodes, the state
% on the free (interior) ones, and in time the control is either
%
%     'interval'   z_1 .. z_N, one per step,
%                  size(z)^2 = sum_{k=1..N} tau |z_k|_Q^2, or
%     'nodal'      z_0 .. z_N, one per level, of which step k sees the mean
%                  (z_{k-1} + z_k)/2, size(z)^2 = sum_{i=0..N} w_i |z_i|_Q^2.
%
% M, A are the P1 mass and stiffness matrices on the free nodes, Q the mass
% matrix on all nodes and B its free rows; N(u)_i = int (u^2)_x phi_i dx.
%
% Nothing here is clever: the whole of space-time is one sparse nonlinear
% system, the KKT conditions of L = J + sum_k lam_k' F_k, and Newton's
% method solves it with backslash.

  if nargin == 0
    store(cases());
  elseif strcmp(task, 'published')
    published();
  else
    error('burgers: unknown task "%s"', task);
  end
end


function list = cases()
% Each row: name of the case, then what differs from the defaults.
  list = {
    'euler',          {}
    'trapezoid',      {'theta', 0.5,  'nx', 24, 'nt', 40, 'alpha', 1e-2}
    'flux',           {'flux', 1,     'nx', 40, 'nt', 24, 'alpha', 1e-3}
    'flux_trapezoid', {'flux', 1,     'nx', 20, 'nt', 30, 'alpha', 1e-4, ...
                       'theta', 0.5,  'nu', 0.02}
    'cheap',          {               'nx', 28, 'nt', 44, 'alpha', 1e-4}
    'theta',          {'theta', 0.75, 'nx', 33, 'nt', 21, 'T', 0.5}
    'nodal',          {'control', 'nodal', 'theta', 0.5, 'nx', 20, 'nt', 20}
    'nodal_cheap',    {'control', 'nodal', 'theta', 0.5, 'nx', 16, 'nt', 28, ...
                       'alpha', 1e-2}
  };
end


function p = parameters(varargin)
% The default problem, with name-value pairs replacing some of it.
  p = struct('nx', 32, 'nt', 32, 'nu', 0.01, 'alpha', 0.05, 'theta', 1, ...
             'flux', 1/2, 'T', 1, 'control', 'interval');
  for k = 1:2:nargin
    p.(varargin{k}) = varargin{k+1};
  end
end


function o = discretize(p)
% Space-time operators.  Vectors over space-time stack the time levels, so
% kron(T, X) applies the matrix X in space and the matrix T in time.

  % Space.  nx counts elements, but interior nodes in the nodal variant.
  if strcmp(p.control, 'nodal'), ne = p.nx + 1; else, ne = p.nx; end
  m = ne - 1;                            % free nodes
  h = 1/ne;
  Q = tridiagonal(ne+1, h/6, 2*h/3, h/6);    % mass matrix on all nodes ...
  Q(1,1) = h/3;  Q(end,end) = h/3;           % ... the end hats are halves
  B = Q(2:end-1, :);                         % its free rows,
  M = B(:, 2:end-1);                         % and free columns
  A = tridiagonal(m, -1/h, 2/h, -1/h);       % stiffness matrix

  % Convection.  By parts, int (u^2)_x phi_i = - int u^2 phi_i', and phi_i'
  % is 1/h left of node i and -1/h right of it.  The mean over an element of
  % the square of a linear function is (a^2 + a b + b^2)/3, a and b being its
  % values at the ends.  With l, u, r the values at nodes i-1, i, i+1:
  %
  %   N_i = (u^2 + u r + r^2)/3 - (l^2 + l u + u^2)/3 = (l + u + r)/3 (r - l).
  E = tridiagonal(m, 1, 1, 1)/3;             % u -> (l + u + r)/3
  G = tridiagonal(m, -1, 0, 1);              % u -> r - l

  % Time.  Rows are the steps 1..N, columns the levels 1..N: level 0 is known
  % and goes to the first step as a constant, below.
  N = p.nt;
  tau = p.T/N;
  I = speye(N);
  P = tridiagonal(N, 1, 0, 0);               % level k -> level k-1
  Theta = p.theta*I + (1 - p.theta)*P;
  w = tau*[1/2; ones(N-1, 1); 1/2];          % trapezoidal, levels 0..N
  if strcmp(p.control, 'nodal')
    C = spdiags(ones(N,1)*[1/2 1/2], [0 1], N, N+1);
    v = w;
  else
    C = I;
    v = tau*ones(N, 1);
  end

  % The step: up to x = 1/2, zero after it.  i/ne, not i*h, which may round
  % the node at 1/2 to the wrong side.
  u0 = double((1:m)'/ne <= 1/2);
  d = u0;
  S0 = p.nu*A*u0 + p.flux*(E*u0).*(G*u0);

  o.m = m;
  o.u0 = u0;
  o.Dt = kron(I - P, M);
  o.Th = tau*kron(Theta, speye(m));
  o.A = p.nu*kron(I, A);
  o.E = kron(I, E);
  o.G = kron(I, G);
  o.c = p.flux;
  o.F0 = [-M*u0 + tau*(1 - p.theta)*S0; zeros(m*(N-1), 1)];
  o.Fz = -tau*kron(C, B);
  o.Juu = kron(diagonal(w(2:end)), M);
  o.Jzz = p.alpha*kron(diagonal(v), Q);
  o.d = repmat(d, N, 1);
  o.J0 = w(1)/2*(u0 - d)'*M*(u0 - d);        % what level 0 adds to J
end


function J = objective(o, u, z)
  e = u - o.d;
  J = o.J0 + e'*o.Juu*e/2 + z'*o.Jzz*z/2;
end


function [F, Fu] = constraint(o, u, z)
% F(u,z) and its u-derivative; the z-derivative is the constant o.Fz.
  Eu = o.E*u;
  Gu = o.G*u;
  S  = o.A*u + o.c*Eu.*Gu;
  Su = o.A + o.c*(diagonal(Eu)*o.G + diagonal(Gu)*o.E);
  F  = o.Dt*u + o.Th*S + o.Fz*z + o.F0;
  Fu = o.Dt + o.Th*Su;
end


function [r, K] = kkt(o, u, z, lam)
% Gradient of L(u, z, lam) and its Hessian, the KKT matrix.
  [F, Fu] = constraint(o, u, z);
  r = [o.Juu*(u - o.d) + Fu'*lam
       o.Jzz*z + o.Fz'*lam
       F];
  if nargout > 1
    q = diagonal(o.c*(o.Th'*lam));           % N is quadratic: (q'N)'' is
    Luu = o.Juu + o.E'*q*o.G + o.G'*q*o.E;   % the same for every u
    Z = sparse(numel(u), numel(z));
    O = sparse(numel(F), numel(F));
    K = [Luu  Z      Fu'
         Z'   o.Jzz  o.Fz'
         Fu   o.Fz   O    ];
  end
end


function [u, z, lam, o, residual] = solve(p)
% Newton's method on the KKT system.  Where control is expensive it changes
% the state little, and the uncontrolled state is a good start.  Where it is
% cheap, the solution for four times the price is.
  o = discretize(p);
  if p.alpha >= 0.05
    [u, z, lam] = uncontrolled(o);
  else
    q = p;
    q.alpha = 4*p.alpha;
    [u, z, lam] = solve(q);
  end
  n = numel(u);  l = numel(z);

  % Backtracking on the residual brings Newton to where it is quadratic, and
  % from there it goes on until rounding keeps the residual from falling.
  r = kkt(o, u, z, lam);
  for iteration = 1:50
    [~, K] = kkt(o, u, z, lam);
    step = -(K\r);
    t = 1;
    while true
      un = u + t*step(1:n);
      zn = z + t*step(n+1:n+l);
      ln = lam + t*step(n+l+1:end);
      rn = kkt(o, un, zn, ln);
      if norm(rn) <= (1 - t/10)*norm(r) || t < 1e-6, break, end
      t = t/2;
    end
    if norm(rn) >= norm(r), break, end
    u = un;  z = zn;  lam = ln;  r = rn;
  end
  residual = norm(r, inf);
  assert(residual < 1e-13, 'Newton stopped at a residual of %g', residual);
end


function [u, z, lam] = uncontrolled(o)
% The state for z = 0, and the multipliers that make L stationary in u there.
  u = repmat(o.u0, size(o.Dt, 1)/o.m, 1);
  z = zeros(size(o.Fz, 2), 1);
  for iteration = 1:50
    [F, Fu] = constraint(o, u, z);
    if norm(F, inf) < 1e-14, break, end
    u = u - Fu\F;
  end
  assert(norm(F, inf) < 1e-12, 'no uncontrolled state');
  lam = -(Fu'\(o.Juu*(u - o.d)));
end


function check_minimum(o, u, z, lam)
% A KKT point could be a saddle.  It is a strict local minimum if the Hessian
% of L is positive definite on the null space of [Fu Fz], spanned by [X; I].
  [~, Fu] = constraint(o, u, z);
  [~, K] = kkt(o, u, z, lam);
  n = numel(u);
  X = -full(Fu\o.Fz);
  H = X'*K(1:n, 1:n)*X + o.Jzz;
  [~, flag] = chol((H + H')/2);
  assert(flag == 0, 'not a minimum');
end


function store(list)
  csv = fopen('burgers.csv', 'w');
  fprintf(csv, ['case,control,nx,nt,T,nu,alpha,theta,flux,' ...
                'objective,kkt_residual\n']);
  for k = 1:size(list, 1)
    name = list{k, 1};
    p = parameters(list{k, 2}{:});
    [u, z, lam, o, residual] = solve(p);
    check_minimum(o, u, z, lam);

    s = p;                                   % time levels become rows
    s.u = reshape(u, o.m, []).';
    s.z = reshape(z, o.m + 2, []).';
    s.lam = reshape(lam, o.m, []).';
    s.objective = objective(o, u, z);
    s.kkt_residual = residual;
    save(['burgers_' name '.mat'], '-struct', 's', '-v7');

    fprintf(csv, '%s,%s,%d,%d,%.15g,%.15g,%.15g,%.15g,%.15g,%.17g,%.2g\n', ...
            name, p.control, p.nx, p.nt, p.T, p.nu, p.alpha, p.theta, ...
            p.flux, s.objective, residual);
    fprintf('%-15s J = %.14f   residual %.1e\n', name, s.objective, residual);
  end
  fclose(csv);
end


function published()
% Optima from the literature, for the nodal variant with theta = 1/2.  They
% leave out the constant sum_i w_i/2 |d|_M^2 over the levels i = 1..N.
  optima = [ 20   5e-2  -0.17292528343
             40   5e-2  -0.17891014258
             80   5e-2  -0.18142894734
            160   5e-2  -0.18249137488
             80   1     -0.10309907218
             80   1e-1  -0.16347748940
             80   1e-2  -0.21185581908
             80   1e-3  -0.23249758813 ];
  for row = optima'
    p = parameters('control', 'nodal', 'theta', 0.5, 'nx', row(1), ...
                   'nt', row(1), 'alpha', row(2));
    [u, z, ~, o] = solve(p);
    J = objective(o, u, z);
    constant = o.d'*o.Juu*o.d/2;
    assert(abs(J - constant - row(3)) < 1e-11);
    fprintf('%3d x %3d, alpha = %5g: J = %.12f, %.11f (published %.11f)\n', ...
            row([1 1]), row(2), J, J - constant, row(3));
  end
end


function A = tridiagonal(n, below, on, above)
  A = spdiags(ones(n, 1)*[below on above], -1:1, n, n);
end


function D = diagonal(x)
  D = spdiags(x, 0, numel(x), numel(x));
end
